"""No matrix product has a scalar that changes from update to update.

oneDNN compiles alpha and beta of a bf16 product into its kernel and keeps up to 4096 kernels. A scalar that depends on
data compiles a new kernel at each call, which costs time and gigabytes of memory.
"""

from pathlib import Path

import pytest
from catalogue import options
from torch.utils._python_dispatch import TorchDispatchMode

from llm.training.module import LanguageModule
from llm.training.train import train

PRODUCTS = ("addmm", "baddbmm", "addmv", "addbmm", "mm", "bmm")


RANGE = {name: ("model/position=rerope",) if name == "vq" else () for name in options("model/attention")}


class ScalarsOfProducts(TorchDispatchMode):
    """Records the scalars of every matrix product by update."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[set[tuple[str, str, float]]] = [set()]

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        if name in PRODUCTS:
            self.updates[-1] |= {(name, key, kwargs[key]) for key in ("alpha", "beta") if key in (kwargs or {})}
        return function(*arguments, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param((f"optimizer={name}",), id=name) for name in options("optimizer")),
        *(pytest.param((f"model/attention={name}", *RANGE[name]), id=name) for name in options("model/attention")),
        pytest.param(("model=moe", "optimizer=muon"), id="experts"),
    ],
)
def test_the_scalars_of_products_are_those_of_the_first_updates(composed, tiny, tmp_path: Path, monkeypatch, overrides):
    scalars = ScalarsOfProducts()
    plain = LanguageModule.optimizer_step

    def step(self, *arguments, **options):
        with scalars:
            plain(self, *arguments, **options)
        scalars.updates.append(set())

    monkeypatch.setattr(LanguageModule, "optimizer_step", step)
    # a dispatch mode sees its own thread only
    one_by_one = lambda function, pieces: [function(piece) for piece in pieces]  # noqa: E731
    monkeypatch.setattr("llm.optim.matrix_stacks.side_by_side", one_by_one)
    muon = ("optimizer.matmul_dtype=bfloat16",) if "optimizer=muon" in overrides else ()
    wide = ("model.d_model=128", "model.ffn.d_ff=128")  # Muon iterates large matrices one by one
    base = [*tiny, *wide, "max_steps=6", "val_every=6", "trainer.precision=bf16-mixed"]
    train(composed(*base, *overrides, *muon), tmp_path)
    first, later = set().union(*scalars.updates[:2]), set().union(*scalars.updates[2:])
    assert later <= first
