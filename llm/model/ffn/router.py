"""Defines the router that sends each token to a fixed number of experts."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm.errors import ConfigError
from llm.model.ffn.routing import Router, Routing
from llm.model.ffn.scores import SCORE_FUNCTIONS, Scores, divided_by_sum, resolve_routed_scale
from llm.ops.linear_layer import linear_product


class TopKRouter(Router):
    """A router that chooses the top_k experts of each token and weights them.

        chosen = top_k of σ(W x) + b,   g = λ · h(W x)[chosen]  (divided by its sum, if normalised)

    The bias b of the balancing rule affects the choice and never the weights. The choice has no gradient, so W learns
    through g only. The router computes in fp32 in every precision of the run.

    Args:
        d_model: width of the residual stream.
        num_experts: number of experts to choose from.
        top_k: experts per token, in [1, num_experts].
        num_shared_experts: number of experts that every token uses too, for routed_scale=auto.
        scores: h, the softmax over all experts, or the sigmoid or relu of each logit.
        normalize: whether a token's weights are divided by their sum.
        routed_scale: λ > 0, or auto for `auto_routed_scale`.

    Raises:
        ConfigError: top_k lies outside [1, num_experts]; the weight of a single expert is normalised, which makes it 1
            and leaves the router without a gradient; or the scale is not above 0.

    Source: Shazeer et al., arXiv:1701.06538, eq. 3-5 without its noise; sigmoid scores, selection bias and scale of
    DeepSeek-V3, arXiv:2412.19437, eq. 12-16. Differs: the choice is always made among sigmoid scores, which rank as
    the logits do and keep the bias on one scale (Su, kexue.fm/archives/10757).
    """

    selection: ClassVar = "top_k"
    has_empty_slots: ClassVar = False

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        top_k: int,
        num_shared_experts: int,
        scores: Scores,
        normalize: bool,
        routed_scale: float | Literal["auto"],
    ) -> None:
        super().__init__()
        if normalize and top_k == 1:
            raise ConfigError(
                "model.ffn.router.normalize=true: with top_k=1 every gate weight is 1 and the router gets no gradient; "
                "use normalize=false or top_k=2"
            )
        self.top_k, self.num_experts, self.normalize = top_k, num_experts, normalize
        self.scores, self.score = scores, SCORE_FUNCTIONS[scores]
        geometry: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "normalize": normalize}
        geometry |= {"num_shared_experts": num_shared_experts, "scores": scores}
        self.routed_scale = resolve_routed_scale(routed_scale, **geometry)
        self.proj = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Float[Tensor, "tokens d_model"], selection_bias: Float[Tensor, " experts"] | None) -> Routing:
        logits = router_logits(x, self.proj)
        scores = self.score(logits)
        ranking = logits if selection_bias is None else logits.sigmoid() + selection_bias
        expert_ids = ranking.detach().topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, expert_ids)
        weights = divided_by_sum(weights) if self.normalize else weights
        return Routing(
            expert_ids=expert_ids,
            gate_weights=weights * self.routed_scale,
            logits=logits,
            probabilities=divided_by_sum(scores),
        )


def router_logits(x: Float[Tensor, "tokens d_model"], proj: nn.Linear) -> Float[Tensor, "tokens experts"]:
    """Return W x in fp32, also under autocast, since a rounded logit changes which expert is chosen."""
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        return linear_product(x.to(dtype), proj.weight.to(dtype))
