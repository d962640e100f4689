import re

import pytest
import torch
from catalogue import CONF, options

from llm.config.build import build_meta_model, build_model
from llm.distributed.parameters import count_parameters
from llm.errors import ConfigError

VOCAB = 50


def tiny(composed, *overrides):
    small = ["model.d_model=32", "model.num_layers=2", "model.ffn.d_ff=48"]
    return build_model(composed(*small, *overrides), VOCAB)


def run(model, ids, documents=None):
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return model.logits(model(ids, positions=positions, document_ids=documents).hidden)


@pytest.mark.parametrize("size", options("model/size"))
def test_the_count_in_a_sizes_comment_is_true(composed, size):
    comment = (CONF / f"model/size/{size}.yaml").read_text()
    stated, vocab = (
        int(text.replace("_", "")) for text in re.findall(r"# ([\d_]+) parameters .* of ([\d_]+);", comment)[0]
    )
    model = build_meta_model(composed(f"model/size={size}"), vocab)
    assert sum(p.numel() for p in model.parameters()) == stated
    assert count_parameters(model)[0] == stated


@pytest.mark.parametrize("time", [1, 63])
def test_a_token_sees_those_before_it_and_none_after(composed, time):
    model = tiny(composed).double()
    hidden = torch.randn(1, time, 32, dtype=torch.float64)

    def forward(x):
        for layer in model.layers:
            x = layer(x, positions=torch.arange(time)[None], document_ids=None).hidden
        return x.sum((0, 2))

    jacobian = torch.autograd.functional.jacobian(forward, hidden).squeeze(1).abs().sum(-1)
    assert torch.equal(jacobian > 0, torch.ones(time, time).tril().bool())


def test_a_document_is_blind_to_its_neighbour(composed):
    model = tiny(composed)
    ids = torch.randint(VOCAB, (1, 20))
    documents = torch.tensor([[0] * 8 + [1] * 12])
    changed = ids.clone()
    changed[0, :8] = (changed[0, :8] + 1) % VOCAB
    torch.testing.assert_close(run(model, ids, documents)[:, 8:], run(model, changed, documents)[:, 8:], rtol=0, atol=0)


def test_a_tied_head_is_the_embedding_itself(composed):
    tied, untied = (tiny(composed, f"model.tie_embeddings={flag}") for flag in ("true", "false"))
    assert tied.lm_head.weight is tied.token_embedding.weight
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == VOCAB * 32


def test_the_same_seed_draws_the_same_weights(composed):
    first, second = tiny(composed), tiny(composed)
    other = tiny(composed, "seed=1")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.token_embedding.weight, other.token_embedding.weight)


def test_weights_start_with_the_documented_spread(composed):
    model = build_model(composed("model.d_model=256", "model.num_layers=8", "model.ffn.d_ff=512"), VOCAB)
    layer = model.layers[0]
    # 65536 draws: the sample's spread is within 1 % of the true one
    assert layer.attention.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert layer.attention.o_proj.weight.std().item() == pytest.approx(256**-0.5 / 4, rel=0.02)
    assert layer.ffn.down_proj.weight.std().item() == pytest.approx(512**-0.5 / 4, rel=0.02)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_recomputed_blocks_give_the_same_gradients_and_keep_less(composed):
    ids = torch.randint(VOCAB, (2, 9))
    gradients, kept = [], []
    for flag in ("false", "2", "true"):
        model = tiny(composed, "model.num_layers=4", f"model.activation_checkpointing={flag}")
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            out = run(model, ids).square().sum()
        kept.append(sum(sizes))
        out.backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))
    assert kept[2] < kept[1] < kept[0]


def test_flops_count_two_for_each_weight_used_and_the_mean_number_of_keys(composed):
    model = tiny(composed, "model.num_heads=4", "model.num_kv_heads=2")
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    mixing = 2 * 4 * 32 * (128 + 1) / 2  # layers x (scores and values, a multiply and an add) x width x keys
    assert model.flops_per_token(128) == 2 * weights + mixing


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_heads=6", r"model.num_heads=6: must divide model.d_model=32; try 4 or 8"),
        ("model.num_kv_heads=3", r"model.num_kv_heads=3: must divide model.num_heads=4"),
        ("model.num_layers=0", r"model.num_layers=0: must be at least 1"),
        ("model.activation_checkpointing=-1", r"model.activation_checkpointing=-1: must be true, false, or N above 0"),
        ("model.dropout=1.0", r"model.dropout=1.0: must lie in \[0, 1\)"),
        ("model.head_dim=0", r"model.head_dim=0: must be at least 1, or null"),
        ("model.init.embedding_std=-1", r"model.init.embedding_std=-1: must be at least 0 and finite"),
        ("model.head_dim=5", r"model.head_dim=5: rotary positions rotate pairs of elements"),
    ],
)
def test_dimensions_that_do_not_fit_are_named(composed, override, message):
    with pytest.raises(ConfigError, match=message):
        tiny(composed, override)
