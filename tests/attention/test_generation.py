"""Decoders of every kind of attention generate the same text alone and in a batch, with and without the cache."""

import pytest
import torch

from llm.config.build import build_model
from llm.generate import stream_tokens

KINDS = {
    "softmax": ("model/attention=softmax", "model/position=rope"),
    "window": ("model/attention=softmax", "model/position=rope", "model.attention.window=7"),
    "two views": ("model/attention=softmax", "model/position=rerope", "model.position.window=6"),
    "linear": ("model/attention=linear", "model.attention.chunk_size=8"),
    "performer": ("model/attention=performer", "model.attention.chunk_size=8"),
    "vq": (
        "model/attention=vq", "model/position=rerope", "model.position.window=6", "model.attention.block_size=8",
        "model.attention.codebook.codebook_size=16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_continue_as_each_does_alone_without_a_cache(kind, composed):
    overrides = ("model.d_model=32", "model.num_layers=2", "model.ffn.d_ff=48", *KINDS[kind])
    model = build_model(composed(*overrides), 40)
    ids = torch.randint(40, (2, 60))
    model.train()(ids, positions=torch.arange(60).expand(2, -1))  # a codebook starts from a batch
    model.eval()
    prompts = [[1, 2, 3], [4], list(range(5, 35))]
    sampling = {"max_new_tokens": 25, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    together = torch.stack(list(stream_tokens(model, prompts, use_cache=True, **sampling)), 1)
    for row, prompt in enumerate(prompts):
        alone = torch.stack(list(stream_tokens(model, [prompt], use_cache=False, **sampling)), 1)[0]
        assert together[row].tolist() == alone.tolist()
