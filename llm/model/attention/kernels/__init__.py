"""Attention over documents: functions that choose the kernel, and the slow definition."""

from llm.model.attention.kernels.dispatch import causal_attention, sighted_attention
from llm.model.attention.kernels.reference import reference_attention

__all__ = ["causal_attention", "reference_attention", "sighted_attention"]
