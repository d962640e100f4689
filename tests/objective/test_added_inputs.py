"""Extra tokens and times lie outside the vocabulary and change no other weight."""

import pytest
import torch

from llm.config.build import build_model
from llm.errors import ShapeError
from llm.optim.param_groups import build_param_groups


def with_inputs(cfg, monkeypatch, **inputs):
    monkeypatch.setattr("llm.objective.next_token.NextToken.extra_tokens", inputs.get("extra_tokens", 0))
    monkeypatch.setattr("llm.objective.next_token.NextToken.num_times", inputs.get("num_times", 0))
    return build_model(cfg, 64)


def test_one_seed_gives_the_same_shared_weights_and_the_same_next_random_number(composed, tiny, monkeypatch):
    cfg = composed(*tiny)
    plain, after = with_inputs(cfg, monkeypatch), torch.rand(())
    more, after_more = with_inputs(cfg, monkeypatch, extra_tokens=2, num_times=2), torch.rand(())
    state = more.state_dict()
    assert all(torch.equal(state.pop(name), tensor) for name, tensor in plain.state_dict().items())
    assert {name.partition(".")[0] for name in state} == {"extra_embedding", "time_embedding"}
    assert torch.equal(after, after_more)
    assert not state["time_embedding.outer.1.weight"].any()
    assert state["time_embedding.outer.0.weight"].std() == pytest.approx(32**-0.5, rel=0.1)
    kinds = {name: g["kind"] for g in build_param_groups(more, lr=1.0, weight_decay=0.0) for name in g["names"]}
    assert kinds["extra_embedding.weight"] == "embedding"
    assert kinds["time_embedding.inner.0.weight"] == "matrix"
    assert set(more.initial_stds) == set(kinds) - {n for n, k in kinds.items() if k == "vector"}


def test_extra_tokens_are_read_and_never_predicted_and_always_have_a_gradient(composed, tiny, monkeypatch):
    model = with_inputs(composed(*tiny), monkeypatch, extra_tokens=1)
    ids, positions = torch.randint(0, 64, (2, 8)), torch.arange(8).expand(2, -1)
    out = model(ids, positions=positions)
    assert model.logits(out.hidden).shape[-1] == 64
    gradient = torch.autograd.grad(out.hidden.sum(), model.extra_embedding.weight)[0]
    assert not gradient.any()
    masked = ids.clone()
    masked[:, 3] = 64
    changed = model(masked, positions=positions)
    assert not torch.equal(changed.hidden[:, 3], out.hidden[:, 3])
    assert torch.autograd.grad(changed.hidden.sum(), model.extra_embedding.weight)[0].any()
    with pytest.raises(ShapeError, match="input_ids=None"):
        model(positions=positions)


def test_times_and_embedded_vectors_are_inputs(composed, tiny, monkeypatch):
    model = with_inputs(composed(*tiny), monkeypatch, num_times=1)
    ids, positions = torch.randint(0, 64, (2, 8)), torch.arange(8).expand(2, -1)
    vectors = model.token_embedding(ids)
    one, two = (model(ids, positions=positions, times=torch.full((2, 8, 1), t)).hidden for t in (0.3, -2.0))
    assert not torch.allclose(one, two)
    same = model(embedded=vectors, positions=positions, times=torch.full((2, 8, 1), 0.3)).hidden
    assert torch.equal(one, same)
