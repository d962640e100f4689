"""A parameter is read only while its own module or one that borrows it runs, as ZeRO stage 3 requires."""

import pytest
import torch
from catalogue import options
from parameter_parts import Parts

from llm.config.build import build_model

VQ = ("model/attention=vq", "model/position=none")
CHOICES = {
    **{f"attention={name}": (f"model/attention={name}", "model/position=none") for name in options("model/attention")},
    **{
        f"vq {name}": (*VQ, f"model.attention.codebook.estimator={name}")
        for name in ("straight_through", "rotation", "simvq")
    },
    **{f"ffn={name}": (f"model/ffn={name}",) for name in options("model/ffn") if name != "moe"},
    **{f"balance={name}": ("model=moe", f"model/ffn/balance={name}") for name in options("model/ffn/balance")},
    "balance=budget": ("model=moe", "model/ffn/balance=budget", "model/ffn/router=threshold"),
    **{f"norm={name}": (f"model/norm={name}",) for name in options("model/norm")},
    **{f"model={name}": (f"model={name}",) for name in options("model")},
    "tied": ("model.tie_embeddings=true",),
    "untied": ("model.tie_embeddings=false",),
    "qk_norm": ("model.attention.qk_norm=true",),
    "learned decay": ("model/attention=linear", "model.attention.decay=learned"),
}


@torch.no_grad()
def answers(model, ids, positions):
    """Return the losses, and the scores of a decoding with a cache."""
    hidden = model.eval()(ids, positions=positions).hidden
    caches = model.new_caches(batch=1, max_length=ids.shape[1], dtype=torch.float32)
    steps = [
        model.logits(model(ids[:1, i : i + 1], positions=positions[:1, i : i + 1], caches=caches).hidden)
        for i in range(ids.shape[1])
    ]
    return model.loss(hidden, ids, reduction="none"), torch.cat(steps, 1), model.logits(hidden)


@pytest.mark.parametrize("choice", CHOICES)
def test_no_parameter_is_read_while_it_is_not_gathered(composed, tiny, choice):
    model = build_model(composed(*tiny, "model.num_layers=1", *CHOICES[choice]), 300)
    ids = torch.randint(300, (2, 4))
    positions = torch.arange(4).expand(2, -1)
    expected = answers(model, ids, positions)
    Parts(model)
    torch.testing.assert_close(answers(model, ids, positions), expected, rtol=0, atol=0)
