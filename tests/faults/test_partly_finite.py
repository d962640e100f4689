"""An update in which the gradients of some tensors are not finite, under `on_nonfinite=tiger`."""

import threading

import pytest
import torch
from torch import nn

from llm.distributed.zero.sharded_gradients import ShardedGradients
from llm.optim.gradients import WholeGradients
from llm.optim.shard import ShardLayout, Slice
from llm.optim.tiger import Tiger
from llm.run_folder.checkpoint import load_model
from llm.scaling.noise_estimate import SmoothedNoiseScale
from llm.training.module import LanguageModule
from llm.training.train import train

SETTINGS = ("optimizer=tiger", "optimizer.shrink_ratio=0.5", "on_nonfinite=tiger", "schedule=constant", "max_steps=3",
            "val_every=3", "checkpoint_every=3", "callbacks.samples=null", "trainer.precision=32-true")  # fmt: skip
VQ = ("model/attention=vq", "model/position=none", "model.attention.codebook.codebook_size=4")
BROKEN, CLIP = "layers.0.ffn.up_proj.weight", 0.05


def norm_of(gradients):
    return float(torch.nn.utils.get_total_norm(list(gradients)))


def test_whole_gradients_are_clipped_over_the_finite_tensors():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    given = [[3.0, 0, 0], [0, 4.0, 0], [float("nan"), 1, 1], [float("inf"), 1, 1]]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = torch.tensor(gradient)
    WholeGradients(parameters).clip_finite(1.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0, 0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0, 0.8, 0]))
    assert not any(bool(p.grad.isfinite().all()) for p in parameters[2:])
    WholeGradients(parameters).clip_finite(2.0)
    torch.testing.assert_close(norm_of(p.grad for p in parameters[:2]), 1.0), "gradients within the bound are scaled"


@pytest.mark.parametrize("micro_batch_size", [8, 4])
def test_in_a_run_the_finite_tensors_are_clipped_alone(composed, tiny, tmp_path, monkeypatch, micro_batch_size):
    """With 8 windows per update: in one micro-batch and accumulated over two, of which one is not finite."""
    seen, plain = [], Tiger.step

    def breaks(self, optimizer):
        named = dict(self.model.named_parameters())
        if self.global_step == 1:
            named[BROKEN].grad[0, 0] = float("nan")

    def step(self, closure=None):
        def noted():
            loss = closure()
            found = {id(p): p.grad.clone() for group in self.param_groups for p in group["params"]}
            seen.append([g for g in found.values() if g.isfinite().all()])
            return loss

        return plain(self, noted)

    monkeypatch.setattr(LanguageModule, "on_before_optimizer_step", breaks)
    monkeypatch.setattr(Tiger, "step", step)
    more = (f"trainer.gradient_clip_val={CLIP}", "batch_tokens=512", f"micro_batch_size={micro_batch_size}")
    train(composed(*tiny, *SETTINGS, *more), tmp_path)
    assert [len(gradients) for gradients in seen] == [len(seen[0]), len(seen[0]) - 1, len(seen[0])]
    assert [norm_of(gradients) for gradients in seen] == pytest.approx([CLIP] * 3, rel=1e-3)


class TwoRanks:
    """Sums over two threads that stand for the ranks."""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(2), {}

    def layout(self, rank, table):
        flat = nn.Parameter(torch.zeros(max(s.offset + s.numel for s in table[rank])))
        layout = ShardLayout(flat, table, rank=rank, group=None)

        def all_reduce(values, op):
            self.values[rank] = values
            self.barrier.wait()
            total = self.values[0] + self.values[1]
            self.barrier.wait()
            return total

        layout.all_reduce = all_reduce
        return layout


@pytest.mark.parametrize("is_one_part", [False, True])
def test_sharded_gradients_are_clipped_over_the_tensors_that_are_finite_on_every_rank(is_one_part):
    """Tensor b is cut between the ranks and broken on one; a and c have the norm 5."""
    ranks = TwoRanks()
    table = [
        [Slice("a", (2,), 0, 2, 0), Slice("b", (4,), 0, 2, 2)],
        [Slice("b", (4,), 2, 2, 0), Slice("c", (2,), 0, 2, 2)],
    ]
    given = [torch.tensor([3.0, 0.0, 7.0, 7.0]), torch.tensor([float("nan"), 7.0, 4.0, 0.0])]

    class Zero:
        def __init__(self, gradient):
            self.averaged_gradients = {0: [gradient] if is_one_part else list(gradient.split(2))}

    def clip(rank):
        ShardedGradients(Zero(given[rank]), [ranks.layout(rank, table)]).clip_finite(1.0)

    threads = [threading.Thread(target=clip, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    torch.testing.assert_close(given[0], torch.tensor([0.6, 0.0, 7.0, 7.0]))
    torch.testing.assert_close(given[1], torch.tensor([float("nan"), 7.0, 0.8, 0.0]), equal_nan=True)


def test_averages_over_updates_stay_finite(composed, tiny, tmp_path, monkeypatch):
    plain = LanguageModule.training_step

    def broken(self, batch, batch_idx):
        hook = None
        if self.global_step == 1:
            hook = self.model.token_embedding.register_forward_hook(lambda *a: a[2] * float("nan"))
        loss = plain(self, batch, batch_idx)
        if hook is not None:
            hook.remove()
        return loss

    monkeypatch.setattr(LanguageModule, "training_step", broken)
    train(composed(*tiny, *SETTINGS, *VQ), tmp_path)
    state = load_model((tmp_path / "checkpoints/last").resolve())
    assert any("codebook" in name for name in state)
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_a_measurement_that_is_not_finite_does_not_change_the_noise_scale():
    noise = SmoothedNoiseScale(decay=0.5)
    noise.update("all", signal=1.0, trace=4.0)
    noise.update("all", signal=float("nan"), trace=float("nan"))
    noise.update("all", signal=float("inf"), trace=4.0)
    assert noise.value("all") == 4.0
