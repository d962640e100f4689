"""Evaluates how concentrated attention is."""

from matplotlib.axes import Axes

from llm.contracts import Batch
from llm.errors import ConfigError
from llm.evals.evaluation import Result, Subject, validation_batches, window_noise
from llm.model.attention.concentration import concentration_by_layer


class AttentionEntropy:
    """An evaluation of the entropy and concentration of attention per layer; see `llm.model.attention.concentration`.

    Args:
        windows: number of windows of the validation split, at least 1; memory grows with the pairs of a window.

    Raises:
        ConfigError: windows is below 1.
    """

    def __init__(self, *, windows: int) -> None:
        if windows < 1:
            raise ConfigError(f"eval.attention.windows={windows}: must be at least 1; try 4")
        self.windows = windows

    def __call__(self, subject: Subject) -> Result:
        """Measure the attention of the subject."""
        batch = next(validation_batches(subject, 1))
        batch = Batch(**{key: value[: self.windows] for key, value in batch.items()})  # type: ignore[typeddict-item]
        prepared = subject.objective.prepare(subject.model, batch, window_noise(0, batch))
        layers = concentration_by_layer(subject.model, **prepared.inputs)
        names = ("entropy", "effective_keys", "sparsity")
        rows = [[str(index), *(f"{layer[name]:.4f}" for name in names)] for index, layer in enumerate(layers)]
        mean = {name: sum(layer[name] for layer in layers) / len(layers) for name in names}
        return Result(
            headline={"attention entropy": mean["entropy"], "keys in effect": mean["effective_keys"]},
            figures=layers,
            header=["layer", "entropy, nats", "keys in effect", "sparsity"],
            rows=rows,
            draw=lambda axes: _draw(axes, layers),
        )


def _draw(axes: Axes, layers: list[dict[str, float]]) -> None:
    places = list(range(len(layers)))
    axes.bar(places, [layer["entropy"] for layer in layers], color="tab:blue")
    axes.set_xticks(places)
    axes.set_xlabel("layer")
    axes.set_ylabel("entropy of attention, nats")
    other = axes.twinx()
    other.plot(places, [layer["effective_keys"] for layer in layers], color="tab:orange", marker="o")
    other.set_ylabel("keys in effect", color="tab:orange")
    other.set_ylim(bottom=0)
