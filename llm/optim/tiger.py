"""Tiger: Lion with one beta, relative learning rates, and gradient accumulation inside the momentum."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from llm.contracts import OptimizerTraits, ParamGroup
from llm.errors import ConfigError, did_you_mean
from llm.optim import foreach
from llm.optim.base import (
    GroupedOptimizer,
    Slab,
    active_rows,
    descend,
    gradients_of,
    has_rows,
    in_range,
    keep_idle_rows,
    slabs,
)
from llm.optim.shard import ShardLayout
from llm.optim.tiger_shards import broken_tensors, move_shard_by_sign, relative_rates, shrink, watched

VECTOR_RATE = 0.5
"""Factor on lr for gains and biases, whose rate is not relative to their RMS. The value is that of Tiger's code."""

ACCUMULATE = ("buffer", "momentum")


class Tiger(GroupedOptimizer):
    """An optimizer that moves weights by the sign of one momentum, at a rate relative to the tensor's RMS.

        m ← β·m + (1−β)·g;  θ ← θ − η·(sign(m) + λθ)
        η = lr·RMS(θ) for matrices and the head, lr·RMS(row) for each row of an embedding, lr/2 for vectors

    With k micro-batches and `accumulate="momentum"`, the backward pass adds each gradient to m and frees it:
    m ← [β at the first, else 1]·m + (1−β)·g/k. No accumulation buffer is needed, and the step equals the ordinary one
    up to fp32 rounding. This works on one device only, and gradients cannot be clipped.

    Args:
        params: groups from `build_param_groups`.
        lr: peak relative rate, >= 0: the fraction of its RMS that a matrix moves per step.
        weight_decay: decoupled weight decay λ, >= 0.
        beta: decay rate β of the momentum, in [0, 1).
        min_rms: lower bound of the RMS of a tensor or row, >= 0; with 0, a matrix of zeros never moves.
        shrink_ratio: factor in (0, 1) for tensors with a non-finite gradient, or None. Such a tensor keeps its momentum
            and shrinks by this factor towards its resting value, which is 1 for gains and 0 otherwise. Its state counts
            these events as `shrunk`. With None, the run's `on_nonfinite` handles such gradients.
        accumulate: where micro-batches are accumulated: in the gradients ("buffer") or in the momentum ("momentum").
        skip_idle_rows: do not update a token's embedding, or an expert of a stack, that has no gradient.

    Raises:
        ConfigError: if a setting is out of range, a group has no kind, or several devices use accumulate="momentum".
        ShapeError: if a training strategy has flattened a matrix.

    Source: Su, "Tiger: A Tight-fisted Optimizer", kexue.fm/archives/9512, and its reference code, bojone/tiger.
    Differs: `min_rms` (published: 0); non-finite means NaN or infinite (published: NaN); the decay of a cycle is
        applied with its first finite micro-batch (published: with its first, and lost if that one is NaN); lr counts
        updates, not micro-batches; `skip_idle_rows` (published: the sign of a stale momentum moves an unused row).
    """

    traits: ClassVar = OptimizerTraits(update_family="sign", has_relative_rates=True)

    def __init__(
        self,
        params: list[ParamGroup],
        *,
        lr: float,
        weight_decay: float,
        beta: float,
        min_rms: float,
        shrink_ratio: float | None,
        accumulate: str,
        skip_idle_rows: bool,
    ) -> None:
        self.beta, self.min_rms = in_range("beta", beta, 0.0, 1.0), in_range("min_rms", min_rms, 0.0, 1e6)
        self.shrink_ratio = None if shrink_ratio is None else in_range("shrink_ratio", shrink_ratio, 1e-6, 1.0)
        if accumulate not in ACCUMULATE:
            raise ConfigError(
                f"optimizer.accumulate={accumulate}: must be one of {', '.join(ACCUMULATE)}; "
                f"choose one{did_you_mean(str(accumulate), ACCUMULATE)}"
            )
        self.skip_idle_rows, self.folds = skip_idle_rows, accumulate == "momentum"
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        if self.folds:
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
        return parameter.grad is not None or self.state.get(parameter, {}).get("folded", 0) > 0

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update the momenta by the gradients, then move the parameters by the signs of the momenta."""
        if self.folds:
            params = [p for p in params if self._closes_cycle(group, p)]
        elif self.shrink_ratio is not None:
            params = [p for p in params if not self._shrink_if_broken(group, p)]
        for rows in (False, True):
            members = [p for p in params if has_rows(p, group["kind"]) == rows]
            if members:
                self._move(group, members, rows=rows and self.skip_idle_rows)

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
        sizes, rates = relative_rates(flat, layout, kind=group["kind"], lr=lr, min_rms=self.min_rms)
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

    def _move(self, group: dict[str, Any], params: list[Tensor], *, rows: bool) -> None:
        gradients = [self._take_mask(p) for p in params] if self.folds else gradients_of(params)
        for slab, rate in self._paired(group, params, gradients, self.buffers(group, params)):
            if not self.folds:
                foreach.lerp_(slab.state["momentum"], slab.gradients, 1 - self.beta)

            def apply(slab: Slab = slab, rate: list[float] = rate) -> None:
                move_by_sign(slab, rate, group, min_rms=self.min_rms)

            if rows:
                keep_idle_rows(slab, apply)
            else:
                apply()

    def _paired(
        self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]]
    ) -> Any:
        """Yield slabs with the rates of the tensors that they are cut from."""
        if params[0].device.type != "cpu":
            rates = self._rates(group, params)
            yield from ((slab, rates) for slab in slabs(params, gradients, state))
            return
        for i, parameter in enumerate(
            params
        ):  # one at a time, so that the update finds the tensor in the cache after its norm was read
            rates = self._rates(group, [parameter])
            held = {name: buffers[i : i + 1] for name, buffers in state.items()}
            yield from ((slab, rates) for slab in slabs([parameter], [gradients[i]], held))

    def _rates(self, group: dict[str, Any], params: list[Tensor]) -> list[float]:
        """Return η of each tensor; for an embedding, the factor that is multiplied by each row's RMS."""
        lr = float(group["lr"])
        if group["kind"] == "vector":
            return [VECTOR_RATE * lr] * len(params)
        if group["kind"] == "embedding":
            return [lr] * len(params)
        norms = torch.stack(norms_of(params)).tolist()  # one synchronization with the device, not one per tensor
        return [lr * max(norm / p.numel() ** 0.5, self.min_rms) for norm, p in zip(norms, params, strict=True)]

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
            if self.skip_idle_rows and has_rows(parameter, group["kind"]):
                used = active_rows(gradient).float()
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


def norms_of(params: list[Tensor]) -> list[Tensor]:
    """Return ‖θ‖ of each tensor. On a CPU reduce rows first: torch takes a whole tensor's norm with one thread."""
    if params[0].device.type != "cpu":
        return list(foreach.norm(params))
    return [torch.linalg.vector_norm(torch.linalg.vector_norm(parameter, dim=-1)) for parameter in params]


def move_by_sign(slab: Slab, rates: list[float], group: dict[str, Any], *, min_rms: float) -> None:
    """Apply θ ← θ − η·(sign(m) + λθ), where η is one number per tensor, or per row of an embedding."""
    momenta, decay = slab.state["momentum"], float(group["weight_decay"])
    if slab.scratch is None:
        signs = list(foreach.sign(momenta))
    else:
        signs = [torch.sign(m, out=room) for m, room in zip(momenta, slab.scratch, strict=True)]
    if group["kind"] == "embedding":
        for parameter, sign, rate in zip(slab.params, signs, rates, strict=True):
            rms = torch.linalg.vector_norm(parameter, dim=-1, keepdim=True).div_(parameter.shape[-1] ** 0.5)
            eta = rms.clamp_(min=min_rms).mul_(rate)
            if decay:
                parameter.mul_(1 - decay * eta)
            parameter.addcmul_(sign, eta, value=-1)
    elif len(set(rates)) == 1:
        descend(slab.params, signs, lr=rates[0], weight_decay=decay)
    else:
        if decay:
            foreach.mul_(slab.params, [1 - rate * decay for rate in rates])
        foreach.mul_(signs, rates)
        foreach.sub_(slab.params, signs)
