"""Evaluates how evenly a model uses its experts, and the entropy of its router."""

from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from llm.errors import ConfigError
from llm.evals.evaluation import Result, Subject, check_batches, watch
from llm.model.ffn.expert_counts import expert_counts, max_violation
from llm.model.ffn.routing import Router, Routing


class ExpertUsage:
    """An evaluation that counts the tokens per expert over the validation split.

    Args:
        batches: number of validation batches, or None for all.

    Raises:
        ConfigError: batches is below 1, or the model has no experts.
    """

    def __init__(self, *, batches: int | None) -> None:
        self.batches = check_batches("experts", batches)

    def __call__(self, subject: Subject) -> Result:
        """Count the tokens of the subject's experts."""
        counts: dict[int, Tensor] = {}
        entropy: dict[int, list[float]] = {}

        def see(layer: int, routing: Routing) -> None:
            num_experts = routing.logits.shape[1]
            own = expert_counts(routing.expert_ids, num_experts).double().cpu()
            counts[layer] = counts.get(layer, torch.zeros_like(own)) + own
            entropy.setdefault(layer, []).append(float(torch.special.entr(routing.probabilities).sum(-1).mean()))

        if not watch(subject, Router, see, batches=self.batches):
            raise ConfigError(
                "eval=experts: the model has no experts; remove it from eval, or evaluate a run of model=moe"
            )
        layers = [_figures(index, counts[index], entropy[index]) for index in sorted(counts)]
        rows = [
            [
                str(layer["layer"]),
                f"{layer['max_violation']:.3f}",
                str(layer["dead_experts"]),
                f"{layer['top_expert_share']:.3f}",
                f"{layer['router_entropy']:.3f}",
            ]
            for layer in layers
        ]
        worst = max(layer["max_violation"] for layer in layers)
        dead = sum(layer["dead_experts"] for layer in layers)
        return Result(
            headline={"max violation": worst, "dead experts": dead},
            figures=layers,
            header=["layer", "max violation", "dead experts", "top expert's share", "router entropy, nats"],
            rows=rows,
            draw=lambda axes: _draw(axes, layers),
        )


def _figures(layer: int, counts: Tensor, entropy: list[float]) -> dict[str, Any]:
    load = counts / counts.sum().clamp_min(1)
    return {
        "layer": layer,
        "max_violation": float(max_violation(counts)),
        "dead_experts": int((counts == 0).sum()),
        "top_expert_share": float(load.max()),
        "router_entropy": sum(entropy) / len(entropy),
        "load": load.tolist(),
    }


def _draw(axes: Axes, layers: list[dict[str, Any]]) -> None:
    loads = torch.tensor([layer["load"] for layer in layers]) * len(layers[0]["load"])
    image = axes.imshow(loads, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    axes.set_yticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label="load over an even share")
