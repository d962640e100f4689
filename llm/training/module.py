"""The LightningModule: one training step, one validation step, and the one line that sets the learning rate."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from llm.contracts import Batch, ParamGroup
from llm.distributed.zero.weights import state_shapes
from llm.errors import NonFiniteError, SpikeError
from llm.evals.metrics import validation_metrics
from llm.model.transformer import Transformer, TransformerOutput
from llm.ops.loss import linear_cross_entropy
from llm.optim.gradients import FirstGradients, WholeGradients
from llm.optim.param_groups import build_param_groups, parameter_kinds
from llm.run_folder.checkpoint import compare_state
from llm.scaling import rates as tensor_rates
from llm.scaling.batching import BatchRamp
from llm.scaling.derivation import derivation
from llm.scaling.rates import Rates
from llm.training.spikes import SpikeGuard

FORWARD_AND_BACKWARD = 3
"""FLOPs of a training step over those of its forward pass: the backward pass multiplies by each weight twice."""

MAX_NONFINITE_IN_A_ROW = 10
"""Steps without a finite loss and gradient after which `on_nonfinite=skip` gives up."""

REFUSED = ("spiked_steps", "nonfinite_steps", "nonfinite_in_a_row", "nonfinite_step")
"""What a resumed run counts on from."""

STATISTIC = "stat/"
"""Metrics named so are not logged but summed over an update's micro-batches and ranks, and handed back to their layer
by `after_optimizer_step(statistics)`: expert counts, codebook sums."""


class LanguageModule(L.LightningModule):
    """Trains a decoder on next-token prediction; the objective is cross-entropy plus what sublayers return as losses.

        lr(step) = group.lr x scaling(batch_tokens at step) x schedule(step)

    Args:
        model: the decoder.
        optimizer: factory, called as `optimizer(param_groups)`.
        lr: peak learning rate at the base batch.
        weight_decay: decoupled decay of matrices.
        schedule: `f(step, total_steps=…) -> lr_factor`.
        scaling: `f(batch_tokens) -> lr_scale`.
        rates: how each tensor's lr and decay follow from those of the run.
        ramp: optimizer updates in the run, and the tokens of each.
        half_life_note: what the batch did to the optimizer's half-lives in tokens, for the receipt.
        batch_tokens: tokens per update, over all devices; of the largest, where they differ.
        context_length: tokens a window.
        token_bytes: bytes that each token id stands for, to give bits per byte.
        on_nonfinite: what to do with a loss or gradient that is not finite: stop (`raise`), or leave the step out
            (`skip`), or hand it to Tiger, which shrinks the tensors concerned (`tiger`); the last two stop after
            MAX_NONFINITE_IN_A_ROW such steps.
        generate: `f(model, prompts, …) -> texts`, for samples along the way; see `llm.generate`.
        spikes: tells which finite updates to leave out, or to go back from; None: none.

    Attributes:
        refused: what is known of the last update that was left out, until a callback has taken it.
    """

    model: Transformer
    token_bytes: Tensor
    borrowed_parameters: ClassVar = ("model.lm_head.weight",)

    def __init__(
        self,
        *,
        model: Transformer,
        optimizer: Callable[[list[ParamGroup]], torch.optim.Optimizer],
        lr: float,
        weight_decay: float,
        schedule: Callable[..., float],
        scaling: Callable[[int], float],
        rates: Rates,
        ramp: BatchRamp,
        half_life_note: str,
        batch_tokens: int,
        context_length: int,
        token_bytes: Int[Tensor, " vocab"],
        on_nonfinite: Literal["raise", "skip", "tiger"],
        generate: Callable[..., list[str]],
        spikes: SpikeGuard | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.build_optimizer, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.schedule, self.scaling, self.rates = schedule, scaling, rates
        self.ramp, self.total_steps = ramp, ramp.total_steps
        self.batch_tokens, self.context_length, self.half_life_note = batch_tokens, context_length, half_life_note
        self.generate, self.on_nonfinite = generate, on_nonfinite
        self.spikes, self.spiked_steps, self._dropped_step = spikes, 0, -1
        self.refused: dict[str, Any] | None = None
        self.nonfinite_steps, self.nonfinite_in_a_row, self.nonfinite_step = 0, 0, -1
        self.register_buffer("token_bytes", token_bytes.float(), persistent=False)
        self.flops_per_token = FORWARD_AND_BACKWARD * model.flops_per_token(context_length)
        self._run_model: Callable[..., TransformerOutput] = model.__call__  # a method: the decoder is registered once
        self.step_metrics: dict[str, Tensor | float] = {}
        self._first_gradients: FirstGradients | None = None
        self._pending: dict[str, list[Tensor]] = {}
        self._statistics: dict[str, Tensor] = {}

    def compile_model(self, **options: Any) -> None:
        """Run the decoder through torch.compile from now on; state and names stay those of the plain decoder."""
        self._run_model = torch.compile(self.model, **options).__call__

    def forward(self, batch: Batch) -> TransformerOutput:
        return self._run_model(batch["input_ids"], positions=batch["positions"], document_ids=batch["document_ids"])

    def configure_optimizers(self) -> Any:
        """One optimizer over tagged groups, one factor on every group's rate, set before each update."""
        groups = rated_groups(
            self.model, self.rates, optimizer=self.build_optimizer, lr=self.lr, weight_decay=self.weight_decay
        )
        optimizer = self.build_optimizer(groups)
        scheduler = LambdaLR(optimizer, lambda step: self.lr_multiplier(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_multiplier(self, step: int) -> float:
        """What every group's lr is multiplied by at `step`."""
        return self.scaling(self.batch_tokens_at(step)) * self.schedule(step, total_steps=self.total_steps)

    @property
    def lr_derivation(self) -> list[str]:
        """How the learning rate follows from the batch: a line for each batch size of the run."""
        sizes = dict.fromkeys(batch_tokens for _, _, batch_tokens in self.ramp.stages)
        note = f"; {self.half_life_note}" if self.half_life_note else ""
        return [derivation(self.scaling, lr=self.lr, batch_tokens=size) + note * (len(sizes) == 1) for size in sizes]

    def batch_tokens_at(self, step: int) -> int:
        """Tokens of the update that follows `step` updates."""
        return self.ramp.batch_tokens_at(step)

    def tokens_seen(self, step: int) -> int:
        """Tokens of the first `step` updates."""
        return self.ramp.tokens_seen(step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch: mean cross-entropy in nats a token, plus the sublayers' losses."""
        out = self.forward(batch)  # not self(batch): stage 3 frees borrowed parameters at the end of a call
        loss = linear_cross_entropy(out.hidden, self.model.lm_head.weight, batch["labels"])
        self._collect({"train/loss": loss, **{f"train/{k}": v for k, v in (out.losses | out.metrics).items()}})
        for extra in out.losses.values():
            loss = loss + extra
        return loss

    def on_train_start(self) -> None:
        """On several devices every parameter has to have a gradient."""
        if self.trainer.world_size > 1:
            self._first_gradients = FirstGradients(self.model)

    def on_after_backward(self) -> None:
        """After the first micro-batch of a session it is known which parameters have none."""
        if self._first_gradients is not None:
            watched, self._first_gradients = self._first_gradients, None
            watched.check(lambda counts: self._reduced(counts.to(self.device), "sum"))

    def _collect(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if STATISTIC in name:
                held = self._statistics.get(name)
                self._statistics[name] = value.detach().clone() if held is None else held.add_(value.detach())
            else:
                self._pending.setdefault(name, []).append(value.detach())

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Run the micro-batch and the update, then hand statistics to the layers that gathered them."""
        step = self.global_step
        super().optimizer_step(*arguments, **options)
        statistics, self._statistics = self._statistics, {}
        if self._dropped_step == step:  # nothing may change
            return
        for index, layer in enumerate(self.model.blocks()):
            prefix = f"train/layer{index}/{STATISTIC}"
            own = {
                n.removeprefix(prefix): self._reduced(v, "sum") for n, v in statistics.items() if n.startswith(prefix)
            }
            for piece in layer.modules() if own else ():
                receive = getattr(piece, "after_optimizer_step", None)
                if callable(receive):
                    receive(own)

    def _reduced(self, value: Tensor, reduce_op: Literal["sum", "mean"]) -> Tensor:
        """Combine over the ranks."""
        if self.trainer.world_size == 1:
            return value
        return torch.as_tensor(self.trainer.strategy.reduce(value, reduce_op=reduce_op))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the raw gradient's norm, refuse one that is not finite, and clip: always before the update rule.

        An optimizer that folds gradients into its momentum during the backward pass leaves none to measure here.
        """
        gradients = self._gradients()
        norm = gradients.norm()
        losses = torch.stack(self._pending["train/loss"])
        means = {name: self._reduced(torch.stack(values).mean(0), "mean") for name, values in self._pending.items()}
        self._pending.clear()
        # a kind with several rates is shown with its first
        rates = {f"lr/{group['kind']}": float(group["lr"]) for group in reversed(optimizer.param_groups)}
        if len(self.ramp.stages) > 1:
            rates["batch_tokens"] = self.batch_tokens_at(self.global_step)
        self.step_metrics = {**means, **({"grad_norm": norm} if gradients.exist else {}), **rates}
        if not bool(torch.isfinite(norm + means["train/loss"])):
            self._note_refused("not finite", losses, means["train/loss"], norm)
            self._refuse_update(gradients, loss=float(means["train/loss"]), norm=float(norm))
        elif self.spikes and (why := self.spikes.judge(float(means["train/loss"]), float(norm))):
            self._note_refused(why, losses, means["train/loss"], norm)
            if self.spikes.goes_back:
                raise SpikeError(self.global_step, why)
            self.spiked_steps, self._dropped_step = self.spiked_steps + 1, self.global_step
            self.step_metrics["spiked_steps"] = float(self.spiked_steps)
            gradients.drop()
        elif gradient_clip_val:
            gradients.clip(gradient_clip_val, norm)

    def _note_refused(self, why: str, losses: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Keep what a callback writes down of an update that is not applied: every rank's micro-batches' losses."""
        ranks = losses[None] if self.trainer.world_size == 1 else self.trainer.strategy.all_gather(losses)
        self.refused = {"step": self.global_step + 1, "why": why, "loss": float(loss), "grad_norm": float(norm)}
        self.refused["losses"] = ranks.float().reshape(-1, len(losses)).tolist()

    def _gradients(self) -> Any:
        """The gradients of the update to come: whole, or in the shards of a strategy that holds them so."""
        sharded = getattr(self.trainer.strategy, "gradients", None)
        return WholeGradients(self.model.parameters()) if sharded is None else sharded()

    def _refuse_update(self, gradients: Any, *, loss: float, norm: float) -> None:
        """Stop, drop the gradients so that no state changes, or leave them to Tiger; many in a row always stop."""
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if self.nonfinite_step == self.global_step - 1 else 1
        self.nonfinite_step = self.global_step
        self.nonfinite_steps += 1
        where = f"loss={loss} grad_norm={norm} at step {self.global_step + 1}"
        is_last_straw = self.on_nonfinite == "raise" or self.nonfinite_in_a_row >= MAX_NONFINITE_IN_A_ROW
        if is_last_straw and self.spikes and self.spikes.goes_back:
            raise SpikeError(self.global_step, f"loss={loss} grad_norm={norm} is not finite")
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f"{where}: not finite, and nothing was updated; lower optimizer.lr, lengthen schedule.warmup, or skip "
                "such steps with on_nonfinite=skip"
            )
        if self.nonfinite_in_a_row >= MAX_NONFINITE_IN_A_ROW:
            raise NonFiniteError(
                f"{where}: the {MAX_NONFINITE_IN_A_ROW}th step in a row that is not finite; lower optimizer.lr, or go "
                "back with resume"
            )
        if self.on_nonfinite == "skip":
            gradients.drop()
            self._dropped_step = self.global_step
        self.step_metrics["nonfinite_steps"] = float(self.nonfinite_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what spikes are told by, and how many updates were refused."""
        if self.spikes:
            checkpoint["spikes"] = self.spikes.state_dict()
        checkpoint["refused"] = {name: getattr(self, name) for name in REFUSED}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that another architecture made, before Lightning copies any."""
        compare_state(checkpoint["state_dict"], state_shapes(self), source=f"resume=step {checkpoint['global_step']}")
        if self.spikes and "spikes" in checkpoint:
            self.spikes.load_state_dict(checkpoint["spikes"])
        for name in REFUSED:
            setattr(self, name, checkpoint.get("refused", {}).get(name, getattr(self, name)))

    def on_validation_epoch_start(self) -> None:
        """Start the sums of loss, tokens and bytes."""
        self._validation = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up loss in nats, tokens and the bytes they stand for."""
        self._validation += self.loss_sums(batch).to(self._validation)

    def loss_sums(self, batch: Batch) -> Tensor:
        """Return [summed loss in nats, number of labels, bytes the labels stand for] in fp64."""
        hidden, labels = self.forward(batch).hidden, batch["labels"]
        losses = linear_cross_entropy(hidden, self.model.lm_head.weight, labels, reduction="none")
        counted = labels >= 0
        num_bytes = self.token_bytes[labels.clamp_min(0)][counted]
        return torch.stack([losses.double().sum(), counted.double().sum(), num_bytes.double().sum()])

    def on_validation_epoch_end(self) -> None:
        """Log loss, bits per byte and perplexity over the whole validation set, of all ranks."""
        sums = self._reduced(self._validation, "sum")
        for name, value in validation_metrics(*sums.tolist()).items():
            # the recorder hands them to the loggers, with tokens_seen beside them
            self.log(name, value, logger=False, sync_dist=self.trainer.world_size > 1)

    def generate_text(self, prompts: list[str], **options: Any) -> list[str]:
        """Continue prompts with the decoder as it stands."""
        return self.generate(self.model, prompts, **options)


def rated_groups(
    model: Transformer, rates: Rates, *, optimizer: Callable[..., Any], lr: float, weight_decay: float
) -> list[ParamGroup]:
    """Return the model's tagged groups, each tensor with the rate that follows from its kind and shape."""
    named, update, pairs = dict(model.named_parameters()), tensor_rates.update_of(optimizer), {}
    for name, kind in parameter_kinds(model).items():
        rows, columns = (1, *named[name].shape)[-2:]
        tensor = tensor_rates.Tensor(name, kind, rows, columns, model.initial_stds.get(name, 0.0))
        pair = rates.rate(tensor, lr=lr, weight_decay=weight_decay, d_model=model.d_model, update=update)
        pairs[name] = tuple(pair)
    return build_param_groups(model, lr=lr, weight_decay=weight_decay, rates=pairs)
