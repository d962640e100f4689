"""Tiger: Lion with one beta, relative learning rates, and gradient accumulation inside the momentum."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from llm.contracts import MomentumWeights, OptimizerTraits, ParamGroup
from llm.errors import ConfigError
from llm.optim import foreach
from llm.optim.checks import in_range, one_of
from llm.optim.grouped_optimizer import GroupedOptimizer, Slab, gradients_of, slabs
from llm.optim.idle_rows import active_rows, keep_idle_rows, row_axes
from llm.optim.shard import ShardLayout
from llm.optim.signed_steps import RatedPiece, experts_of, move_by_sign, norms_of
from llm.optim.tiger_shards import broken_tensors, move_shard_by_sign, relative_rates, shrink, watched

VECTOR_RATE = 0.5
"""Factor on lr for gains and biases, whose rate is not relative to their RMS. The value is that of Tiger's code."""

ACCUMULATE = ("buffer", "momentum")


class Tiger(GroupedOptimizer):
    """An optimizer that moves weights by the sign of one momentum, at a rate relative to the tensor's RMS.

        m ← β·m + (1−β)·g;  θ ← θ − η·(sign(m) + λθ)
        η = lr·RMS(θ) for matrices, experts and the head, lr·RMS(row) for each row of an embedding, lr/2 for vectors

    With k micro-batches and `accumulate="momentum"`, the backward pass adds each gradient to m and frees it:
    m ← [β at the first, else 1]·m + (1−β)·g/k. No accumulation buffer is needed, and the step equals the ordinary one
    up to fp32 rounding. This works on one device only, and gradients cannot be clipped.

    Args:
        params: groups from `build_param_groups`.
        lr: peak relative rate, >= 0: the fraction of its RMS that a matrix moves per step.
        weight_decay: decoupled weight decay λ, >= 0.
        beta: decay rate β of the momentum, in [0, 1).
        min_rms: lower bound of the RMS of a tensor, expert or row, >= 0.
        min_rms_ratio: lower bound of the same RMS as a fraction of the tensor's initial standard deviation, or of
            1/√d_in for a tensor that starts at 0; >= 0. With both bounds at 0, a matrix of zeros never moves.
        shrink_ratio: factor in (0, 1) for tensors with a non-finite gradient, or None. Such a tensor keeps its momentum
            and shrinks by this factor towards its resting value, which is 1 for gains and 0 otherwise. Its state counts
            these events as `shrunk`. With None, the run's `on_nonfinite` handles such gradients.
        accumulate: where micro-batches are accumulated: in the gradients ("buffer") or in the momentum ("momentum").
        skip_idle_rows: do not update a token's embedding, or an expert of a stack, that has no gradient.

    Raises:
        ConfigError: if a setting is out of range, a group has no kind, or several devices use accumulate="momentum".
        ShapeError: if a training strategy has flattened a matrix.

    Source: Su, "Tiger: A Tight-fisted Optimizer", kexue.fm/archives/9512, and its reference code, bojone/tiger.
    Differs: `min_rms_ratio` (published: 0); one RMS per expert of a stack; non-finite means NaN or infinite (published:
        NaN); the decay of a cycle is applied with its first finite micro-batch (published: with its first, and lost if
        that one is NaN); lr counts updates, not micro-batches; `skip_idle_rows` (published: the sign of a stale
        momentum moves an unused row).
    """

    traits: ClassVar = OptimizerTraits(
        update_family="sign",
        has_relative_rates=True,
        momentum_weights=lambda settings: MomentumWeights.of_average(settings["beta"]),
    )

    def __init__(
        self,
        params: list[ParamGroup],
        *,
        lr: float,
        weight_decay: float,
        beta: float,
        min_rms: float,
        min_rms_ratio: float = 0.0,
        shrink_ratio: float | None,
        accumulate: str,
        skip_idle_rows: bool,
    ) -> None:
        self.beta, self.min_rms = in_range("beta", beta, 0.0, 1.0), in_range("min_rms", min_rms, 0.0, 1e6)
        self.min_rms_ratio = in_range("min_rms_ratio", min_rms_ratio, 0.0, 1e6)
        self.shrink_ratio = None if shrink_ratio is None else in_range("shrink_ratio", shrink_ratio, 1e-6, 1.0)
        self.skip_idle_rows, self.folds = skip_idle_rows, one_of("accumulate", accumulate, ACCUMULATE) == "momentum"
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        if self.folds:
            self._register_folding()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied optimizer; the copies of parameters need hooks of their own."""
        super().__setstate__(state)
        if state.get("folds"):  # torch's load_state_dict comes here too, with the state alone
            self._register_folding()

    @property
    def folds_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the backward pass adds gradients to the momentum."""
        return self.folds

    def rule_of(self, group: dict[str, Any]) -> str:
        """Return "tiger" with the quantity that its rate is relative to."""
        return {"vector": "tiger (lr/2)", "embedding": "tiger (row RMS)"}.get(group["kind"], "tiger (RMS)")

    def is_due(self, parameter: Tensor) -> bool:
        """Return whether `parameter` has a gradient, or has added one to its momentum since the last step."""
        return super().is_due(parameter) or self.state.get(parameter, {}).get("folded", 0) > 0

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update the momenta by the gradients, then move the parameters by the signs of the momenta."""
        if self.folds:
            params = [p for p in params if self._closes_cycle(group, p)]
        elif self.shrink_ratio is not None:
            params = [p for p in params if not self._shrink_if_broken(group, p)]
        for axes in (None, (-1,), (1, 2)):
            members = [p for p in params if row_axes(p, group["kind"]) == axes]
            if members:
                self._move(group, members, axes=axes if self.skip_idle_rows else None)

    def update_shard(self, group: dict[str, Any], flat: Tensor, layout: ShardLayout) -> None:
        """Update a flat shard; the ranks combine the tensors' RMS and their flags of non-finite gradients."""
        (gradient,) = gradients_of([flat])
        broken = set() if self.shrink_ratio is None else broken_tensors(gradient, layout)
        if broken:
            rest = dict(zip(group["names"], group.get("resting_values", [0.0] * len(group["names"])), strict=True))
            shrink(flat, layout, broken, ratio=self.shrink_ratio or 1.0, rest=rest)
            for name in broken:
                held = self.owned_state.setdefault(name, {})
                held["shrunk"] = held.get("shrunk", torch.zeros((), dtype=torch.long)) + 1
        lr = float(group["lr"])
        floors = dict(zip(group["names"], self.floors(group), strict=True))
        sizes, rates = relative_rates(flat, layout, kind=group["kind"], lr=lr, floors=floors)
        if group["kind"] == "vector":
            rates = {name: torch.full_like(rate, VECTOR_RATE * lr) for name, rate in rates.items()}
        move_shard_by_sign(
            flat,
            self.buffers(group, [flat])["momentum"][0],
            gradient,
            layout,
            sizes=sizes,
            rates=rates,
            broken=broken,
            active=watched(layout, group["kind"], gradient) if self.skip_idle_rows else None,
            beta=self.beta,
            decay=float(group["weight_decay"]),
        )

    def _move(self, group: dict[str, Any], params: list[Tensor], *, axes: tuple[int, ...] | None) -> None:
        gradients = [self._take_mask(p) for p in params] if self.folds else gradients_of(params)
        momenta, floors = self.buffers(group, params)["momentum"], self.floors(group)
        positions = {id(p): position for position, p in enumerate(group["params"])}
        tensors = [
            piece
            for p, gradient, momentum in zip(params, gradients, momenta, strict=True)
            for piece in experts_of(p, gradient, momentum, floors[positions[id(p)]])
        ]
        for slab, rates, bounds in self._paired(group, tensors):
            if not self.folds:
                foreach.lerp_(slab.state["momentum"], slab.gradients, 1 - self.beta)

            def apply(slab: Slab = slab, rates: list[float] = rates, bounds: list[float] = bounds) -> None:
                move_by_sign(slab, rates, group, floors=bounds)

            if axes is not None:
                keep_idle_rows(slab, apply, axes)
            else:
                apply()

    def _paired(
        self, group: dict[str, Any], tensors: list[RatedPiece]
    ) -> Iterator[tuple[Slab, list[float], list[float]]]:
        """Yield slabs with the rates and lower bounds of the tensors that they are cut from.

        On a CPU this takes one tensor at a time, so that the update finds it in the cache after its norm was read.
        """
        on_cpu = tensors[0].param.device.type == "cpu"
        for members in [[tensor] for tensor in tensors] if on_cpu else [tensors]:
            params, floors = [tensor.param for tensor in members], [tensor.floor for tensor in members]
            rates = self._rates(group, params, floors)
            state = {"momentum": [tensor.momentum for tensor in members]}
            yield from ((slab, rates, floors) for slab in slabs(params, [t.gradient for t in members], state))

    def _rates(self, group: dict[str, Any], params: list[Tensor], floors: list[float]) -> list[float]:
        """Return η of each tensor; for an embedding, the factor that is multiplied by each row's RMS."""
        lr = float(group["lr"])
        if group["kind"] == "vector":
            return [VECTOR_RATE * lr] * len(params)
        if group["kind"] == "embedding":
            return [lr] * len(params)
        norms = torch.stack(norms_of(params)).tolist()  # one synchronization with the device, not one per tensor
        values = zip(norms, params, floors, strict=True)
        return [lr * max(norm / max(1, p.numel()) ** 0.5, floor) for norm, p, floor in values]

    def floors(self, group: dict[str, Any]) -> list[float]:
        """Return the lower bound of each tensor's RMS: max(min_rms, min_rms_ratio · initial standard deviation)."""
        stds = group.get("initial_stds", [0.0] * len(group["names"]))
        return [max(self.min_rms, self.min_rms_ratio * std) for std in stds]

    def _shrink_if_broken(self, group: dict[str, Any], parameter: Tensor) -> bool:
        """Shrink the tensor if its gradient is not finite, and return whether it was shrunk."""
        gradient = parameter.grad
        if gradient is None or bool(torch.isfinite(torch.linalg.vector_norm(gradient, ord=float("inf")))):
            return False
        position = next(i for i, p in enumerate(group["params"]) if p is parameter)
        rest = group.get("resting_values", [0.0] * len(group["params"]))[position]
        parameter.sub_(rest).mul_(self.shrink_ratio or 1.0).add_(rest)
        state = self.state[parameter]
        state["shrunk"] = state.get("shrunk", 0) + 1
        return True

    def _register_folding(self) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                "optimizer.accumulate=momentum: works on one device, several would average momenta that already "
                "differ; set optimizer.accumulate=buffer"
            )
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda p, group=group: self._fold(group, p))

    @torch.no_grad()
    def _fold(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Add a micro-batch's gradient to the momentum and free it. The backward pass calls this."""
        state = self.state[parameter]
        if self.shrink_ratio is not None and self._shrink_if_broken(group, parameter):
            state["last_broken"] = 1
        else:
            (gradient,), (momentum,) = gradients_of([parameter]), self.buffers(group, [parameter])["momentum"]
            if not state.get("folded", 0):
                momentum.mul_(self.beta)
            momentum.add_(gradient, alpha=1 - self.beta)
            state["folded"], state["last_broken"] = state.get("folded", 0) + 1, 0
            axes = row_axes(parameter, group["kind"])
            if self.skip_idle_rows and axes is not None:
                used = active_rows(gradient, axes).float()
                state["used"] = torch.maximum(used, state["used"]) if "used" in state else used
        parameter.grad = None

    def _closes_cycle(self, group: dict[str, Any], parameter: Tensor) -> bool:
        """End the parameter's cycle of micro-batches; return whether to update. A non-finite last gradient skips it."""
        state = self.state[parameter]
        if parameter.grad is not None:
            self._fold(group, parameter)
        moves = state.get("folded", 0) > 0 and not state.get("last_broken", 0)
        state["folded"] = state["last_broken"] = 0
        if not moves:
            state.pop("used", None)
        return moves

    def _take_mask(self, parameter: Tensor) -> Tensor:
        """Return a mask in place of the freed gradient: 1 in the rows that had one, expanded as a view."""
        used = self.state[parameter].pop("used", None)
        mask = torch.ones((), device=parameter.device) if used is None else used
        return mask.expand(parameter.shape)
