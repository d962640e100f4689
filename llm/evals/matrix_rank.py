"""Evaluates how many directions the matrices of a model, their gradients and their inputs use."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from llm.contracts import WHOLE_UPDATE, Batch
from llm.errors import ConfigError
from llm.evals.evaluation import Result, Subject, check_batches, validation_batches, window_noise
from llm.ops.spectrum import Spectrum, mean_spectrum, spectrum

KINDS = ("weight", "gradient", "activation")


class MatrixRank:
    """An evaluation of effective rank, stable rank and singular-value entropy of every matrix of the layers.

    Three matrices are measured per projection: the weights, the gradient of the loss on validation text, and the inputs
    of the projection over the tokens of that text. A stack of experts counts with the mean over its experts, and its
    inputs are not measured. See `llm.ops.spectrum`.

    Args:
        batches: number of batches of the validation split, at least 1, or None for all.

    Raises:
        ConfigError: batches is below 1, or the weights are sharded.
    """

    def __init__(self, *, batches: int | None) -> None:
        self.batches = check_batches("rank", batches)

    def __call__(self, subject: Subject) -> Result:
        """Measure the matrices of the subject."""
        matrices = dict(layer_matrices(subject.model))
        if any(not matrix.numel() for matrix in matrices.values()):
            raise ConfigError(
                "eval=rank: the weights are sharded by trainer.stage=3; evaluate the run afterwards with eval.py"
            )
        gradients, inputs = _gradients_and_inputs(subject, matrices, self.batches)
        found: dict[str, dict[str, Spectrum]] = {}
        for name, matrix in matrices.items():
            found[name] = {"weight": mean_spectrum(matrix.detach()), "gradient": mean_spectrum(gradients[name])}
            if name in inputs:  # the eigenvalues of XᵀX are the squares of the singular values of X
                found[name]["activation"] = spectrum(torch.linalg.eigvalsh(inputs[name]).clamp_min(0).sqrt())
        figures = {
            name: {kind: each._asdict() for kind, each in kinds.items()} | {"shape": list(matrices[name].shape)}
            for name, kinds in found.items()
        }
        return Result(
            headline=_means(found),
            figures=figures,
            header=["matrix", "shape", *(f"{kind}: effective, stable, entropy" for kind in KINDS)],
            rows=[_row(name, matrices[name], kinds) for name, kinds in found.items()],
            draw=lambda axes: _draw(axes, found),
        )


def layer_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the matrices and stacks of matrices of the layers by name; the embedding and the head are no layers."""
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and parameter.ndim in (2, 3):
            yield name.removesuffix(".weight"), parameter


def _gradients_and_inputs(
    subject: Subject, matrices: Mapping[str, nn.Parameter], limit: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the summed gradients of the matrices, and the products XᵀX of the inputs of linear layers, in fp64."""
    model, objective = subject.model, subject.objective
    grams: dict[str, Tensor] = {}

    def see(name: str, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).double()
        grams[name] = grams.get(name, 0) + rows.T @ rows

    modules = [(name, model.get_submodule(name)) for name, matrix in matrices.items() if matrix.ndim == 2]
    hooks = [
        module.register_forward_pre_hook(partial(_report, name, see))
        for name, module in modules
        if isinstance(module, nn.Linear)
    ]
    sums = {name: torch.zeros_like(matrix, dtype=torch.float64) for name, matrix in matrices.items()}
    was_training, seen = model.training, 0
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for batch in validation_batches(subject, limit):
                batch = Batch(**{key: value.clone() for key, value in batch.items()})  # type: ignore[typeddict-item]
                prepared = objective.prepare(model, batch, window_noise(seen, batch))
                seen += len(batch["input_ids"])
                with subject.autocast():
                    out = model(**prepared.inputs)
                    loss, _ = objective.loss(model, model, prepared, out, WHOLE_UPDATE)
                found = torch.autograd.grad(loss, list(matrices.values()), allow_unused=True)
                for name, gradient in zip(matrices, found, strict=True):
                    sums[name] += 0 if gradient is None else gradient.double()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return sums, grams


def _report(name: str, see: Callable[[str, tuple[Tensor, ...]], None], module: nn.Module, inputs: Any) -> None:
    see(name, inputs)


def _means(found: Mapping[str, Mapping[str, Spectrum]]) -> dict[str, float]:
    """Return the means over matrices of each measure, per kind."""
    headline = {}
    for kind in KINDS:
        each = [kinds[kind] for kinds in found.values() if kind in kinds]
        for measure in ("effective_share", "stable_rank", "entropy") if each else ():
            headline[f"{kind} {measure}"] = sum(getattr(one, measure) for one in each) / len(each)
    return headline


def _row(name: str, matrix: Tensor, kinds: Mapping[str, Spectrum]) -> list[str]:
    cells = [
        f"{kinds[kind].effective_rank:.1f}, {kinds[kind].stable_rank:.2f}, {kinds[kind].entropy:.4f}"
        if kind in kinds
        else "-"
        for kind in KINDS
    ]
    return [name, "x".join(map(str, matrix.shape)), *cells]


def _draw(axes: Axes, found: Mapping[str, Mapping[str, Any]]) -> None:
    places = list(range(len(found)))
    for kind in KINDS:
        heights = [kinds[kind].entropy if kind in kinds else float("nan") for kinds in found.values()]
        axes.plot(places, heights, marker=".", label=kind)
    axes.set_xticks(places, [name.removeprefix("layers.") for name in found], rotation=90, fontsize=6)
    axes.set_ylabel("entropy of squared singular values, relative to the largest possible")
    axes.legend(frameon=False, fontsize=9)
