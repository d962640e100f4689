"""Generates text with a decoder: sampling, and a cache so that each token is read once."""

from llm.generate.decode import Decoding, stream_tokens
from llm.generate.sampling import check_sampling, filter_logits, sample_token
from llm.generate.text import Continuation, Generation, generate, generate_text, stream_text

__all__ = [
    "Continuation",
    "Decoding",
    "Generation",
    "check_sampling",
    "filter_logits",
    "generate",
    "generate_text",
    "sample_token",
    "stream_text",
    "stream_tokens",
]
