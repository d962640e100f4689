"""QK-clip: keeps attention logits below a threshold by shrinking the weights of the heads that pass it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm.contracts import LogitMeter
from llm.errors import ConfigError
from llm.optim.shard import ShardLayout, spans


class QueryKeyClip:
    """Shrinks queries and keys of heads whose largest logit passed the threshold τ, right after the optimizer's step.

        S̃_h = max_i log Σ_j exp(logit_hij) ≥ S_h = max_ij logit_hij;   factor_h = min(1, τ / S̃_h)

    S̃ is the log-sum-exp that attention computes anyway, over all micro-batches and ranks of the update. It exceeds the
    largest logit by at most log(visible keys). A head is clipped in the step that follows its measurement, never later:
    it would otherwise be clipped twice for one logit. There is no state, and momenta stay as they are.

    Args:
        threshold: τ, above 0.
        layers: layer of the decoder -> its attention, and the name of the attention in the optimizer's groups.

    Source: Kimi Team, "Kimi K2", arXiv:2507.20534, section 2.1; Su, kexue.fm/archives/11126.
    Differs: S̃ takes the place of the largest logit, which fast kernels do not return. Where a key belongs to several
        heads or is a value as well, the query takes the whole factor.
    """

    def __init__(self, threshold: float, layers: Mapping[int, tuple[str, LogitMeter]]) -> None:
        self.threshold, self.layers = check_threshold(threshold), layers
        self._factors: dict[str, Tensor] = {}
        self._layouts: dict[int, ShardLayout] = {}
        self._remove: Callable[[], None] | None = None
        for _, attention in layers.values():
            attention.measures_logits = True

    def attach(self, optimizer: torch.optim.Optimizer, layouts: Sequence[ShardLayout] = ()) -> None:
        """Clip after each step of `optimizer`, whose groups have whole tensors, or flat shards with these layouts."""
        if self._remove is not None:
            self._remove()
        self._layouts = {id(layout.flat): layout for layout in layouts}
        self._remove = optimizer.register_step_post_hook(lambda stepped, *_: self.apply(stepped.param_groups)).remove

    def measure(self, peaks: Mapping[str, Tensor], *, is_dropped: bool) -> dict[str, Tensor]:
        """Derive the factors of the coming step, and return the metrics `max_logit` and `clipped_heads`.

        Args:
            peaks: S̃ of the update by `<...>layer<index>/peak/logit`.
            is_dropped: whether the update is discarded, so that nothing may change.
        """
        self._factors = {}
        largest = {int(name.split("layer")[1].split("/")[0]): value.float() for name, value in peaks.items()}
        clipped = []
        for index, logits in largest.items():
            passed = (logits > self.threshold) & logits.isfinite()
            clipped.append(passed.sum())
            name, attention = self.layers[index]
            factors = attention.logit_factors(torch.where(passed, self.threshold / logits, 1.0))
            self._factors |= {} if is_dropped else {f"{name}.{own}": value for own, value in factors.items()}
        if not largest:
            return {}
        return {
            "max_logit": torch.stack([logits.amax() for logits in largest.values()]).amax(),
            "clipped_heads": torch.stack(clipped).sum().float(),
        }

    @torch.no_grad()
    def apply(self, groups: Sequence[dict[str, Any]]) -> None:
        """Multiply the blocks of the groups' parameters by their factors. A strategy may step one group at a time."""
        for group in groups:
            for blocks, factors in self._blocks(group):
                blocks.mul_(factors.to(blocks.device, blocks.dtype)[:, None])

    def _blocks(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views with one row per block, and the factors of these rows."""
        if self._layouts:
            for layout in (self._layouts[id(flat)] for flat in group["params"]):
                for piece in layout.slices:
                    if (factors := self._factors.get(piece.name)) is not None:
                        for span in spans(piece, torch.Size(piece.shape).numel() // len(factors)):
                            yield span.of(layout.flat.detach()), factors[span.block :][: span.num_blocks]
            return
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if (factors := self._factors.get(name)) is not None:
                yield parameter.detach().view(len(factors), -1), factors


def check_threshold(value: object) -> float:
    """Return τ.

    Raises:
        ConfigError: if it is not a number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(
            f"qk_clip={value}: must be a number above 0, or null; 100 is usual in long runs, 30 in small models"
        )
    return float(value)


def meters_of(attentions: Mapping[str, object]) -> dict[int, tuple[str, LogitMeter]]:
    """Return the attentions that can be clipped, by layer; `attentions` maps names to attentions in layer order.

    Raises:
        ConfigError: if there is none.
    """
    found = {i: (name, a) for i, (name, a) in enumerate(attentions.items()) if isinstance(a, LogitMeter)}
    if not found:
        kinds = ", ".join(sorted({type(attention).__name__ for attention in attentions.values()}))
        raise ConfigError(
            f"qk_clip: no layer has a softmax over its keys ({kinds}), so there is no logit to bound; set "
            "qk_clip=null, or use model/attention=softmax"
        )
    return found
