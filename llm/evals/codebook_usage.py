"""Evaluates how much of its codebooks a model uses, and how well codes approximate keys."""

from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from llm.errors import ConfigError
from llm.evals.evaluation import Result, Subject, check_batches, watch
from llm.model.attention.codebook import Codebook, Quantized


class CodebookUsage:
    """An evaluation that counts the codes that replace keys, over the validation split.

    Args:
        batches: number of validation batches, or None for all.

    Raises:
        ConfigError: batches is below 1, or the model has no codebook.
    """

    def __init__(self, *, batches: int | None) -> None:
        self.batches = check_batches("codebook", batches)

    def __call__(self, subject: Subject) -> Result:
        """Count the codes of the subject."""
        sizes = {i: m.codebook_size for i, b in enumerate(subject.model.blocks()) for m in _codebooks(b)}
        counts: dict[int, Tensor] = {}
        errors: dict[int, list[float]] = {}

        def see(layer: int, quantized: Quantized) -> None:
            ids = quantized.code_ids.flatten(0, 1).T.cpu()
            own = torch.stack([torch.bincount(head, minlength=sizes[layer]) for head in ids]).double()
            counts[layer] = counts.get(layer, torch.zeros_like(own)) + own
            errors.setdefault(layer, []).append(float(quantized.metrics["quantization_error"]))

        if not watch(subject, Codebook, see, batches=self.batches):
            raise ConfigError(
                "eval=codebook: the model has no codebook; remove it from eval, or evaluate a run of model/attention=vq"
            )
        layers = [_figures(index, counts[index], errors[index]) for index in sorted(counts)]
        names = ("usage", "perplexity", "quantization_error")
        rows = [[str(layer["layer"]), *(f"{layer[name]:.4f}" for name in names)] for layer in layers]
        return Result(
            headline={f"codebook {name}": sum(layer[name] for layer in layers) / len(layers) for name in names[:2]},
            figures=layers,
            header=["layer", "share of codes in use", "perplexity", "relative error"],
            rows=rows,
            draw=lambda axes: _draw(axes, counts),
        )


def _codebooks(block: Any) -> list[Codebook]:
    return [module for module in block.modules() if isinstance(module, Codebook)]


def _figures(layer: int, counts: Tensor, errors: list[float]) -> dict[str, Any]:
    shares = counts / counts.sum(-1, keepdim=True)
    return {
        "layer": layer,
        "usage": float((counts > 0).double().mean()),
        "perplexity": float(torch.special.entr(shares).sum(-1).exp().mean()),
        "quantization_error": sum(errors) / len(errors),
    }


def _draw(axes: Axes, counts: dict[int, Tensor]) -> None:
    for layer, count in sorted(counts.items()):
        shares = (count / count.sum(-1, keepdim=True)).sort(-1, descending=True).values.mean(0)
        axes.plot(range(1, len(shares) + 1), shares.clamp_min(1e-7), label=f"layer {layer}")
    axes.set_yscale("log")
    axes.set_xlabel("code, by how often keys choose it")
    axes.set_ylabel("share of keys")
    axes.legend(frameon=False, fontsize=9)
