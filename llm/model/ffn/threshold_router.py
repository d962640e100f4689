"""Defines the router whose number of experts per token depends on the token's scores."""

from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from llm.errors import ConfigError
from llm.model.ffn.router import router_logits
from llm.model.ffn.routing import Router, Routing
from llm.model.ffn.scores import SCORE_FUNCTIONS, TINY, divided_by_sum, resolve_routed_scale


class ThresholdRouter(Router):
    """A router that chooses every expert whose score is above a threshold, so that hard tokens may use more experts.

        chosen = {i : σ(W x)_i + b_i > 0},   g = λ · σ(W x)[chosen]  (divided by its sum, if normalised)

    The balancing rule sets the bias b, which keeps the average at top_k and the loads even. Of more than max_experts
    chosen experts the best are kept. A token without an expert passes through shared experts and the residual stream.

    Args:
        d_model: width of the residual stream.
        num_experts: number of experts to choose from.
        top_k: experts per token on average.
        num_shared_experts: number of experts that every token uses too, for routed_scale=auto.
        max_experts: largest number of experts per token, in [top_k, num_experts], or null for num_experts; memory
            grows with it.
        normalize: whether a token's weights are divided by their sum.
        routed_scale: λ > 0, or auto for `auto_routed_scale`.

    Raises:
        ConfigError: max_experts is out of its range, or the scale is not above 0.

    Source: Su, "MoE tour, part 4: the harder, the more", kexue.fm/archives/10815. Differs: the cap max_experts.
    """

    selection: ClassVar = "threshold"
    has_empty_slots: ClassVar = True

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        top_k: int,
        num_shared_experts: int,
        max_experts: int | None,
        normalize: bool,
        routed_scale: float | Literal["auto"],
    ) -> None:
        super().__init__()
        self.max_experts = num_experts if max_experts is None else max_experts
        if not top_k <= self.max_experts <= num_experts:
            raise ConfigError(
                f"model.ffn.router.max_experts={max_experts}: must lie between model.ffn.top_k={top_k} and "
                f"model.ffn.num_experts={num_experts}; try {min(4 * top_k, num_experts)}"
            )
        self.num_experts, self.normalize = num_experts, normalize
        geometry: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "normalize": normalize}
        geometry |= {"num_shared_experts": num_shared_experts, "scores": "sigmoid"}
        self.routed_scale = resolve_routed_scale(routed_scale, **geometry)
        self.proj = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Float[Tensor, "tokens d_model"], selection_bias: Float[Tensor, " experts"]) -> Routing:
        logits = router_logits(x, self.proj)
        scores = SCORE_FUNCTIONS["sigmoid"](logits)
        margins, best = (scores + selection_bias).detach().topk(self.max_experts, dim=-1)
        is_chosen = margins > 0
        weights = scores.gather(-1, best) * is_chosen
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        return Routing(
            expert_ids=best.masked_fill(~is_chosen, self.num_experts),
            gate_weights=weights * self.routed_scale,
            logits=logits,
            probabilities=divided_by_sum(scores),
        )
