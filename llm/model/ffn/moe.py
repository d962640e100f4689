"""Defines the mixture-of-experts feed-forward: a router, experts, and a rule that balances their load."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm.contracts import SublayerOutput
from llm.errors import ConfigError
from llm.model.ffn.activation import Activation, read_caps
from llm.model.ffn.balance.balance_rule import Balance
from llm.model.ffn.expert_counts import load_metrics
from llm.model.ffn.experts import RMS_EPSILON, Experts
from llm.model.ffn.routing import Router, Routing
from llm.model.ffn.sizing import Match, expert_width
from llm.model.ffn.swiglu import SwiGLU
from llm.model.norm import RMSNorm
from llm.ops.linear_layer import Linear


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer: each token passes through a few of many experts, and none is dropped.

        y_t = Σ_{e chosen for t} g_te E_e(x_t)  +  Σ_{shared} S(x_t)

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width of the dense layer that `match` compares with.
        num_experts: number of experts to choose from.
        top_k: experts per token, on average where the router decides the number.
        num_shared_experts: number of experts that every token uses too; they are one SwiGLU of their total width.
        match: how experts are sized from d_ff; see `llm.model.ffn.sizing.expert_width`.
        normalize_outputs: whether to scale every routed expert's output to unit root-mean-square, so that experts are
            ranked by the size of their contribution.
        z_loss: weight of mean (log Σ exp logits)², which keeps router logits small; 0 for none, 1e-3 is usual.
        router: a factory, called with d_model, num_experts, top_k and num_shared_experts.
        balance: a factory, called with num_experts and top_k.
        activation, gate_cap, up_cap: of every expert, shared ones included; see `SwiGLU`.
        latent: width l of the space in which routed experts work, y = W_out RMSNorm(Σ_e g_e E_e(W_in x)); None for
            d_model. The norm removes the scale of gate weights, so the router's routed_scale is 1.

    Raises:
        ConfigError: top_k lies outside [1, num_experts], the width of an expert is not whole, a weight is negative, or
            the balancing rule does not support the router.

    Source: Shazeer et al., arXiv:1701.06538; shared experts of DeepSeekMoE, arXiv:2401.06066, eq. 9; z-loss of ST-MoE,
    arXiv:2202.08906, eq. 5; dropless after MegaBlocks, arXiv:2211.15841; latent experts of arXiv:2601.18089, with the
    norm of Su Jianlin, kexue.fm/archives/11848.
    """

    update_counts: Tensor
    shared: SwiGLU | None

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int,
        num_shared_experts: int,
        match: Match,
        normalize_outputs: bool,
        z_loss: float,
        router: Callable[..., Router],
        balance: Callable[..., Balance],
        activation: Activation = "swiglu",
        gate_cap: float | None = None,
        up_cap: float | None = None,
        latent: int | None = None,
    ) -> None:
        super().__init__()
        check_counts(d_ff=d_ff, num_experts=num_experts, top_k=top_k, num_shared=num_shared_experts, z_loss=z_loss)
        counts = {"num_experts": num_experts, "top_k": top_k}
        shared = {"num_shared_experts": num_shared_experts}
        check_latent(latent, d_model=d_model, top_k=top_k, normalize_outputs=normalize_outputs)
        width = expert_width(match=match, d_model=d_model, d_ff=d_ff, latent=latent, **counts, **shared)
        self.num_experts, self.d_expert, self.z_loss = num_experts, width, z_loss
        scale: dict[str, Any] = {} if latent is None else {"routed_scale": 1.0}
        self.router: Router = router(d_model=d_model, **counts, **shared, **scale)
        self.balance: Balance = balance(**counts)
        if self.router.selection not in self.balance.selections:
            raise ConfigError(
                f"model.ffn.balance={type(self.balance).__name__}: does not support {type(self.router).__name__}; "
                "use model/ffn/balance=budget with model/ffn/router=threshold, and only there"
            )
        caps = read_caps(activation, gate_cap=gate_cap, up_cap=up_cap)
        inner = d_model if latent is None else latent
        self.latent_in_proj = None if latent is None else Linear(d_model, latent, bias=False)
        self.experts = Experts(d_model=inner, d_expert=width, normalize_outputs=normalize_outputs, caps=caps, **counts)
        self.latent_norm = None if latent is None else RMSNorm(dim=latent, eps=RMS_EPSILON)
        self.latent_out_proj = None if latent is None else Linear(latent, d_model, bias=False)
        bounds: dict[str, Any] = {"activation": activation, "gate_cap": gate_cap, "up_cap": up_cap}
        shared_width = num_shared_experts * width
        self.shared = SwiGLU(d_model=d_model, d_ff=shared_width, **bounds) if num_shared_experts else None
        self.register_buffer("update_counts", torch.zeros(num_experts, dtype=torch.long), persistent=False)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> SublayerOutput:
        tokens = x.flatten(0, 1)
        routing = self.router(tokens, self.balance.selection_bias())
        mixed, largest = self._routed(tokens, routing)
        hidden = mixed.view_as(x)
        if self.shared is not None:
            shared = self.shared(x)
            hidden = hidden + shared.hidden
            largest = largest.maximum(shared.metrics.get("hidden_max", largest))
        if not self.training:
            return SublayerOutput(hidden=hidden, losses={}, metrics={})
        metrics = self._metrics(routing) | ({} if self.experts.caps is None else {"hidden_max": largest})
        return SublayerOutput(hidden=hidden, losses=self._losses(routing, x.shape[0]), metrics=metrics)

    def _routed(self, tokens: Float[Tensor, "tokens d_model"], routing: Routing) -> tuple[Tensor, Tensor]:
        """Return the sum of the routed experts of each token, through the latent space where there is one."""
        empty = self.router.has_empty_slots
        if self.latent_in_proj is None or self.latent_norm is None or self.latent_out_proj is None:
            return self.experts(tokens, routing, has_empty_slots=empty)
        mixed, largest = self.experts(self.latent_in_proj(tokens), routing, has_empty_slots=empty)
        return self.latent_out_proj(self.latent_norm(mixed)), largest

    def _losses(self, routing: Routing, num_sequences: int) -> dict[str, Tensor]:
        losses = self.balance.losses(routing, num_sequences=num_sequences)
        if self.z_loss:
            losses["z_loss"] = self.z_loss * routing.logits.logsumexp(-1).square().mean()
        return losses

    @torch.no_grad()
    def _metrics(self, routing: Routing) -> dict[str, Tensor]:
        metrics = load_metrics(routing, self.num_experts)
        bias = self.balance.selection_bias()
        if bias is not None:
            metrics["selection_bias_range"] = bias.max() - bias.min()
        statistics = {"num_tokens": torch.full((), routing.logits.shape[0], device=routing.logits.device)}
        statistics |= self.balance.statistics(routing)
        return metrics | {f"stat/{name}": value for name, value in statistics.items()}

    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        """Save how many tokens of the update, over all micro-batches and ranks, each expert received."""
        self.update_counts.copy_(statistics["expert_counts"])

    def flops_per_token(self, context_length: int) -> float:
        """Return forward FLOPs per token: the router, the shared experts and top_k of the others."""
        shared = 0.0 if self.shared is None else self.shared.flops_per_token(context_length)
        latent = sum(p.weight.numel() for p in (self.latent_in_proj, self.latent_out_proj) if p is not None)
        return 2.0 * (self.router.proj.weight.numel() + latent) + self.experts.active_flops_per_token + shared


def check_counts(*, d_ff: int, num_experts: int, top_k: int, num_shared: int, z_loss: float) -> None:
    """Raise ConfigError for a count below its minimum, top_k above num_experts, or a negative z_loss."""
    if d_ff < 1:
        raise ConfigError(f"model.ffn.d_ff={d_ff}: must be at least 1; choose a size with model/size=tiny")
    if num_experts < 1:
        raise ConfigError(f"model.ffn.num_experts={num_experts}: must be at least 1; try 8")
    if not 1 <= top_k <= num_experts:
        raise ConfigError(
            f"model.ffn.top_k={top_k}: must lie in [1, model.ffn.num_experts={num_experts}]; "
            f"try {min(max(top_k, 1), num_experts)}"
        )
    if num_shared < 0:
        raise ConfigError(f"model.ffn.num_shared_experts={num_shared}: must be at least 0; 0 for none")
    if not z_loss >= 0:
        raise ConfigError(f"model.ffn.z_loss={z_loss}: must be at least 0; set 0 for none")


def check_latent(latent: int | None, *, d_model: int, top_k: int, normalize_outputs: bool) -> None:
    """Raise ConfigError for a latent width out of range, or with settings that its norm would make meaningless."""
    if latent is None:
        return
    if not 1 <= latent <= d_model:
        raise ConfigError(
            f"model.ffn.latent={latent}: must lie in [1, model.d_model={d_model}]; {max(1, d_model // 2)} with twice "
            "the experts and twice the top_k is usual, or null for none"
        )
    if top_k == 1:
        raise ConfigError(
            f"model.ffn.top_k=1: the norm of model.ffn.latent={latent} removes the only gate weight, and the router "
            "gets no gradient; set model.ffn.top_k=2 or model.ffn.latent=null"
        )
    if normalize_outputs:
        raise ConfigError(
            f"model.ffn.normalize_outputs=true: model.ffn.latent={latent} has a norm after the sum of experts; set "
            "model.ffn.normalize_outputs=false"
        )
