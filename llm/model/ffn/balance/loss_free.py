"""Balances without an auxiliary loss, by a bias on the choice of experts."""

from typing import Literal

import torch
from torch import Tensor

from llm.model.ffn.balance.balance_rule import BiasBalance, check_rate


class LossFree(BiasBalance):
    """A rule that lowers the selection bias of experts with too many tokens and raises the others, once per update.

        b ← b − rate · sign(F − 1/E)                      rule=sign
        b ← b − rate · (F − 1/E) / RMS(F − 1/E)           rule=rms

    F is each expert's share of the update's slots, over all micro-batches and ranks. The router's gradient stays that
    of the language model's loss. The rate decides how soon balance is reached: a bias crosses the spread of the scores,
    about 0.7 for sigmoid, in 0.7 / rate updates. Where scores are close together (softmax-like routers late in
    training) a large rate makes loads oscillate.

    Args:
        num_experts: E.
        top_k: experts per token.
        rate: largest (sign) or root-mean-square (rms) change of the bias per update, > 0.
        rule: `sign`, or `rms`, which moves each expert in proportion to its error.

    Raises:
        ConfigError: the rate is not above 0.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv:2408.15664,
    algorithm 1; rms after Su, kexue.fm/archives/10757. Differs: each move is centred on zero, which changes no choice
    and keeps the biases from drifting together.
    """

    def __init__(self, *, num_experts: int, top_k: int, rate: float, rule: Literal["sign", "rms"]) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        check_rate("rate", rate)
        self.rate, self.rule = rate, rule

    @torch.no_grad()
    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        counts = statistics["expert_counts"]
        error = (counts - counts.double().mean()).float()
        if self.rule == "sign":
            move = error.sign()
        else:
            move = error / error.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        self.bias.sub_(self.rate * (move - move.mean()))
