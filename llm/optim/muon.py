"""Muon: orthogonalises the momentum of hidden matrices, and updates other parameters by AdamW or Lion."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llm.contracts import OptimizerTraits, ParamGroup
from llm.errors import ConfigError
from llm.ops.precision import DTYPES, products_dtype
from llm.optim import foreach
from llm.optim.blocks import as_blocks, check_heads, descend_blocks, used_blocks
from llm.optim.checks import in_range, one_of
from llm.optim.exchange import OwnerExchange
from llm.optim.grouped_optimizer import GroupedOptimizer, between, gradients_of, slabs
from llm.optim.hyperball import check_hyperball, turn_blocks
from llm.optim.matrix_stacks import for_each, matrix_stacks
from llm.optim.muon_ranks import update_on_ranks
from llm.optim.muon_shards import make_exchange, update_matrix_shard
from llm.optim.newton_schulz import ITERATIONS, orthogonalize
from llm.optim.rank_shares import RankShares
from llm.optim.row_normalization import balance_rows, row_moments
from llm.optim.shard import ShardLayout
from llm.optim.update_rules import apply_rule, apply_rule_to_shard, make_rule
from llm.optim.update_scales import AUX_LR_SCALES, UPDATE_SCALES, muon_weights, update_norm


class Muon(GroupedOptimizer):
    """An optimizer that moves each hidden matrix by an orthogonal one, so that all its directions learn at one rate.

        M ← μ·M + (1−μ)·G;  O = NewtonSchulz((1−μ)·G + μ·M);  W ← W − lr·(scale·O + λ·W)

    The rule `aux` updates embeddings, head and vectors. Each expert of a stack is orthogonalised separately; with
    `by_head`, each attention head is too. Matrices need 4 bytes of state per parameter, other kinds what `aux` needs.

    Args:
        params: groups from `build_param_groups`; parameters of kind `matrix` are orthogonalised.
        lr: peak learning rate, >= 0.
        weight_decay: decoupled weight decay, multiplied by lr but not by `update_scale`; >= 0.
        momentum: decay rate μ of the momentum, in [0, 1).
        nesterov: orthogonalise (1−μ)·G + μ·M if True, and M itself if False.
        iteration: Newton-Schulz coefficients, "quintic", "polar_express" or "polar_express_paper".
        update_scale: "match_adamw", 0.2·√max(d_out, d_in), or "spectral", √max(1, d_out/d_in).
        matmul_dtype: dtype of the products: "float32", "bfloat16", or "auto", bfloat16 where that is native.
        by_head: orthogonalise each attention head separately, where a module declares its projection's heads.
        row_beta: decay rate of the rows' second moments in NorMuon's normalisation, in (0, 1); None disables it.
        cautious_decay: decay only the weights that the update also moves towards 0.
        hyperball: keep the norm of each matrix and let lr be a relative step; `llm.optim.hyperball`. `update_scale`
            then acts on nothing, and matrices must not decay.
        aux: rule for the other kinds, "adamw" or "lion".
        aux_lr_scale: factor on the lr of the other kinds, > 0; "auto" for `AUX_LR_SCALES`.
        aux_betas: betas of `aux`, each in [0, 1).
        aux_eps: eps of AdamW; None for Lion.
        skip_idle_rows: do not update an expert that has no gradient in this step; it does not apply to embeddings.

    Raises:
        ConfigError: if a setting is out of range, a name is unknown, or there is no matrix to orthogonalise.
        ShapeError: if a training strategy has flattened a matrix.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon,
        2024; Liu et al., arXiv:2502.16982, Algorithm 1 without its distribution; Chen et al., "Cautious Weight Decay",
        arXiv:2510.12402, Algorithm 1, for `cautious_decay`.
    Differs: `skip_idle_rows` is added. Orthogonalisation ignores scale, so an old momentum would otherwise move an
        unused expert by full steps. The rule `aux` is part of the same optimizer object.
    """

    _shares: RankShares | None = None  # ranks are not copied with an optimizer

    traits: ClassVar = OptimizerTraits(
        update_family="orthogonal", orthogonalizes=True, momentum_weights=muon_weights, update_norm=update_norm
    )

    def __init__(
        self,
        params: list[ParamGroup],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        iteration: str,
        update_scale: str,
        matmul_dtype: str,
        by_head: bool,
        row_beta: float | None,
        cautious_decay: bool,
        hyperball: bool,
        aux: str,
        aux_lr_scale: float | Literal["auto"],
        aux_betas: Sequence[float],
        aux_eps: float | None,
        skip_idle_rows: bool,
    ) -> None:
        self.momentum, self.nesterov = in_range("momentum", momentum, 0.0, 1.0), nesterov
        self.iteration = one_of("iteration", iteration, ITERATIONS)
        self.update_scale = UPDATE_SCALES[one_of("update_scale", update_scale, UPDATE_SCALES)]
        self.matmul_dtype = one_of("matmul_dtype", matmul_dtype, ("auto", *DTYPES))
        self.row_beta = None if row_beta is None else in_range("row_beta", row_beta, 1e-6, 1.0)
        self.by_head, self.cautious_decay, self.skip_idle_rows = by_head, cautious_decay, skip_idle_rows
        self.hyperball = hyperball
        self.aux = make_rule("aux", aux, betas=aux_betas, eps=aux_eps)
        auto_scale = AUX_LR_SCALES["hyperball" if hyperball else update_scale] * AUX_LR_SCALES[aux]
        aux_scale = auto_scale if aux_lr_scale == "auto" else in_range("aux_lr_scale", aux_lr_scale, 1e-12, 1e12)
        if not any(isinstance(group, dict) and group.get("kind") == "matrix" for group in params):
            raise ConfigError("optimizer=muon: the model has no hidden matrix to orthogonalise; use optimizer=adamw")
        if by_head:
            check_heads(params)
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        if hyperball:
            check_hyperball(self.param_groups, cautious_decay=cautious_decay)
        for group in self.param_groups:
            if group["kind"] != "matrix":
                group["lr"] *= aux_scale

    def rule_of(self, group: dict[str, Any]) -> str:
        """Return "muon" or "muon on a sphere" for matrices and the name of `aux` for other kinds."""
        if group["kind"] != "matrix":
            return self.aux.name
        return "muon on a sphere" if self.hyperball else "muon"

    def buffers_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the buffers: one momentum for matrices, and those of `aux` for other kinds."""
        return ("momentum",) if group["kind"] == "matrix" else self.aux.buffers

    def state_bytes(self, group: dict[str, Any], parameter: Tensor) -> int:
        """Return the bytes of state, including the rows' second moments where they exist."""
        rows = parameter.numel() // parameter.shape[-1] if self.row_beta and group["kind"] == "matrix" else 0
        return super().state_bytes(group, parameter) + 4 * rows

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update matrices by orthogonalised momenta, those of equal shape together; apply `aux` to other kinds."""
        if group["kind"] != "matrix":
            self._update_aux(group, params)
            return
        if self._shares is None:
            for_each(
                matrix_stacks(params, self.heads_of(group, params)),
                lambda stack: self.descend_stack(group, *stack, self.directions(group, *stack)),
            )
        else:
            update_on_ranks(self, group, params, self._shares)

    def share_work(self, shares: RankShares) -> None:
        """Orthogonalise each matrix on one rank alone, where all ranks hold equal weights and gradients."""
        self._shares = shares

    def update_shard(self, group: dict[str, Any], flat: Tensor, layout: ShardLayout) -> None:
        """Update a flat shard. Owner ranks orthogonalise the matrices; other kinds are updated on each rank."""
        (gradient,) = gradients_of([flat])
        if group["kind"] != "matrix":
            apply_rule_to_shard(
                self.aux,
                flat,
                gradient,
                self._aux_state(group, [flat]),
                lr=float(group["lr"]),
                weight_decay=float(group["weight_decay"]),
                active=None,
            )
            return
        largest = max((min(shape[-2:]) for shape in layout.shapes.values()), default=0)
        dtype = products_dtype(self.matmul_dtype, layout.comm_device.type, size=largest)
        (ahead,) = self._look_ahead([gradient], self.buffers(group, [flat])["momentum"], dtype)
        heads = group["heads"] if self.by_head and "heads" in group else [1] * len(group["names"])
        update_matrix_shard(
            flat,
            ahead,
            gradient,
            layout,
            self.exchange_of(layout),
            heads=dict(zip(group["names"], heads, strict=True)),
            group=group,
            muon=self,
            dtype=dtype,
        )

    def exchange_of(self, layout: ShardLayout) -> OwnerExchange:
        """Return the exchange of a layout, which is created once."""
        exchanges = self.__dict__.setdefault("_exchanges", {})
        if id(layout) not in exchanges:
            exchanges[id(layout)] = make_exchange(layout)
        return exchanges[id(layout)]

    def load_owned_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Keep the state of the matrices that this rank owns, since only the owner updates it."""
        layouts = [layout for layout in self._layouts.values() if layout.shapes.keys() & state.keys()]
        owned = {name for layout in layouts for name in self.exchange_of(layout).owned}
        super().load_owned_state({name: held for name, held in state.items() if name in owned})

    def _aux_state(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, list[Tensor]]:
        """Return the state of the rule `aux`, after its step counters are increased."""
        state = self.buffers(group, params)
        if self.aux.name == "adamw":
            for parameter in params:
                held = self.state[parameter]
                held.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))
            state["step"] = [self.state[parameter]["step"] for parameter in params]
            foreach.add_(state["step"], 1.0)
        return state

    def _update_aux(self, group: dict[str, Any], params: list[Tensor]) -> None:
        apply_rule(
            self.aux,
            params,
            gradients_of(params),
            self._aux_state(group, params),
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            axes=None,
        )

    def heads_of(self, group: dict[str, Any], params: list[Tensor]) -> list[int]:
        """Return the heads of each matrix, in the convention of `as_blocks`; 1 unless `by_head`."""
        counts = dict(zip(map(id, group["params"]), group.get("heads", [1] * len(group["params"])), strict=True))
        return [counts[id(parameter)] if self.by_head else 1 for parameter in params]

    def products(self, parameter: Tensor, heads: int) -> torch.dtype:
        """Return the dtype in which a matrix is orthogonalised."""
        size = min(as_blocks(parameter, heads).shape[-2:])
        return products_dtype(self.matmul_dtype, parameter.device.type, size=size)

    def directions(self, group: dict[str, Any], params: list[Tensor], heads: int) -> Tensor:
        """Update the momenta of a stack, and return each orthogonalised."""
        momenta, dtype = self.buffers(group, params)["momentum"], self.products(params[0], heads)
        ahead = [as_blocks(x, heads) for x in self._look_ahead(gradients_of(params), momenta, dtype)]
        blocks = torch.stack(ahead) if len(ahead) > 1 else ahead[0][None]
        return orthogonalize(blocks, iteration=self.iteration, dtype=dtype)

    def descend_stack(self, group: dict[str, Any], params: list[Tensor], heads: int, directions: Tensor) -> None:
        """Move each matrix of a stack along its direction, with rows of even size under `row_beta`."""
        if self.row_beta is not None:
            moments = row_moments([self.state[parameter] for parameter in params], directions)
            directions = balance_rows(directions.float(), moments, beta=self.row_beta)
        for parameter, direction in zip(params, directions, strict=True):
            can_idle = self.skip_idle_rows and parameter.ndim == 3  # a batch uses every matrix, but not every expert
            used = used_blocks(gradients_of([parameter])[0]) if can_idle else None
            self._descend(group, as_blocks(parameter, heads), direction, used)

    def _look_ahead(self, gradients: list[Tensor], momenta: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Update the momenta, and return the matrices to orthogonalise in the dtype of the products."""
        out = [torch.empty_like(gradient, dtype=dtype) for gradient in gradients]
        for slab in slabs(out, gradients, {"momentum": momenta}):
            momentum = slab.state["momentum"]
            foreach.lerp_(momentum, slab.gradients, 1 - self.momentum)
            ahead = between(slab.gradients, momentum, self.momentum, out=slab.scratch) if self.nesterov else momentum
            foreach.copy_(slab.params, ahead)
        return out

    def _descend(self, group: dict[str, Any], weight: Tensor, direction: Tensor, used: Tensor | None) -> None:
        """Move the used blocks of one parameter, and decay them or keep their norms."""
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if self.hyperball:
            turn_blocks(weight, direction, used, lr=lr)
            return
        step = lr * self.update_scale(*weight.shape[-2:])
        descend_blocks(weight, direction, used, decay=lr * decay, step=step, cautious=self.cautious_decay)
