"""QK-clip: which heads it shrinks and by how much, on every optimizer and on shards."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from attention_pairs import GEOMETRY, build_pair, build_small
from catalogue import build_piece, options

from llm.config.check import check
from llm.errors import ConfigError
from llm.model.attention.views import pair_scores
from llm.optim.param_groups import build_param_groups
from llm.optim.qk_clip import QueryKeyClip
from llm.optim.shard import ShardLayout, Slice

TIME = 40
CASES = {
    "heads": {"num_kv_heads": 4},
    "groups": {"num_kv_heads": 2},
    "normalized keys": {"num_kv_heads": 4, "key_norm": True},
    "shared keys and values": {"num_kv_heads": 4, "shared_kv": True},
    "window": {"num_kv_heads": 4, "window": 9},
}


def softmax(position="rope", num_kv_heads=2, **settings):
    built = build_small(f"position/{position}", {}, head_dim=GEOMETRY.head_dim)
    geometry = replace(GEOMETRY, num_kv_heads=num_kv_heads)
    layer = build_small("attention/softmax", settings, position=built, layer_index=0, geometry=geometry).train()
    with torch.no_grad():
        layer.q_proj.weight.view(layer.num_heads, -1)[1].mul_(40)  # one head with large logits
    return layer


def inputs():
    return torch.randn(2, TIME, 48), torch.arange(TIME).expand(2, -1)


def largest_logits(layer, x, positions):
    """Return the largest visible logit of each head, from a time x time matrix."""
    q, k, _ = layer.project(x)
    scores = (pair_scores(layer.position(q, k, positions)) * layer.scale).flatten(1, 2)
    distance = torch.arange(TIME)[:, None] - torch.arange(TIME)
    visible = (distance >= 0) & (distance < (layer.window or TIME))
    return scores.masked_fill(~visible, -math.inf).amax((0, 2, 3)).detach()


def clip_of(layer, threshold):
    return QueryKeyClip(threshold, {0: ("attention", layer)})


def peaks(layer, x, positions):
    return {"train/layer0/peak/logit": layer(x, positions=positions, document_ids=None).metrics["peak/logit"]}


def groups_of(layer):
    named = {f"attention.{name}": parameter for name, parameter in layer.named_parameters()}
    return [{"params": [*named.values()], "names": [*named], "kind": "matrix"}]


@pytest.mark.parametrize("position", ["rope", "rerope"])
@pytest.mark.parametrize("case", CASES)
def test_a_head_that_passes_ends_at_the_threshold_and_others_do_not_change(case, position):
    if position == "rerope" and ("window" in CASES[case] or "shared_kv" in CASES[case]):
        pytest.skip("the definition above knows one band of keys")
    layer = softmax(position, **CASES[case])
    x, positions = inputs()
    clip = clip_of(layer, 1.0)
    clip.threshold = 0.5 * largest_logits(layer, x, positions).amax().item()  # the head is at twice the threshold
    before = largest_logits(layer, x, positions)
    metrics = clip.measure(peaks(layer, x, positions), is_dropped=False)
    clip.apply(groups_of(layer))
    after = largest_logits(layer, x, positions)
    passed = before > clip.threshold
    assert passed.tolist().count(True) == 1
    assert metrics["clipped_heads"] == 1
    assert metrics["max_logit"] >= before.amax()
    assert torch.equal(after[~passed], before[~passed])
    assert after[passed].item() <= clip.threshold * (1 + 1e-5)
    assert after[passed].item() >= clip.threshold * (1 - math.log(TIME) / clip.threshold)


@pytest.mark.parametrize("position", ["rope", "rerope"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_measure_is_never_below_the_largest_logit_nor_more_than_log_n_above(position, scale):
    layer = softmax(position)
    clip_of(layer, 1.0)
    x, positions = inputs()
    (found,) = peaks(layer, scale * x, positions).values()
    gap = found.detach() - largest_logits(layer, scale * x, positions)
    assert (gap >= -1e-4 * found.abs().clamp_min(1)).all()
    assert (gap <= math.log(TIME) + 1e-4 * found.abs()).all()


def test_gains_of_normalized_queries_and_keys_take_the_factor_of_the_largest_head():
    layer = build_pair("softmax", "rope", qk_norm=True).train()
    with torch.no_grad():
        layer.q_norm.weight.mul_(20)
    x, positions = inputs()
    clip = clip_of(layer, 1.0)
    clip.threshold = 0.5 * largest_logits(layer, x, positions).amax().item()
    clip.measure(peaks(layer, x, positions), is_dropped=False)
    clip.apply(groups_of(layer))
    after = largest_logits(layer, x, positions).amax().item()
    assert clip.threshold - math.log(TIME) <= after <= clip.threshold * (1 + 1e-5)


def test_without_a_clip_no_log_sum_exp_is_computed_and_evaluation_never_computes_one():
    layer = softmax()
    x, positions = inputs()
    assert layer(x, positions=positions, document_ids=None).metrics == {}
    clip_of(layer, 1.0)
    assert peaks(layer, x, positions)
    assert layer.eval()(x, positions=positions, document_ids=None).metrics == {}


@pytest.mark.parametrize("is_dropped", [True, False])
@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer_clips_right_after_its_step_unless_the_update_is_dropped(name, is_dropped):
    torch.manual_seed(0)
    layer = softmax()
    optimizer = build_piece("optimizer", name, params=build_param_groups(layer, lr=0.0, weight_decay=0.0))
    clip = QueryKeyClip(5.0, {0: ("", layer)})
    clip.layers = {0: ("x", layer)}
    for group in optimizer.param_groups:
        group["names"] = [f"x.{own}" for own in group["names"]]
    clip.attach(optimizer)
    clip.attach(optimizer)  # a run that starts again must not clip twice
    x, positions = inputs()
    layer(x, positions=positions, document_ids=None).hidden.sum().backward()
    found = peaks(layer, x, positions)
    clip.measure(found, is_dropped=is_dropped)
    before = layer.q_proj.weight.detach().clone()
    optimizer.step()
    factors = (5.0 / next(iter(found.values()))).clamp(max=1.0)
    expected = before if is_dropped else (before.view(layer.num_heads, -1) * factors[:, None]).view_as(before)
    torch.testing.assert_close(layer.q_proj.weight.detach(), expected.detach(), rtol=1e-6, atol=0)
    assert (factors < 1).any()


def test_a_head_that_ranks_have_cut_anywhere_is_clipped_bit_for_bit_as_a_whole_one():
    weight, factors = torch.randn(24, 48), torch.tensor([1.0, 0.3, 0.7, 1.0, 0.9, 0.11])
    whole = weight.clone()
    layer = softmax()
    clip = clip_of(layer, 1.0)
    clip._factors = {"q": factors}
    parameter = torch.nn.Parameter(whole)
    clip.apply([{"params": [parameter], "names": ["q"]}])
    cuts, flat = [0, 5, 193, 194, 700, weight.numel()], []
    for start, end in itertools.pairwise(cuts):
        part = torch.nn.Parameter(weight.flatten()[start:end].clone())
        layout = ShardLayout(part, [[Slice("q", (24, 48), start, end - start, 0)]], rank=0, group=None)
        clip._layouts = {id(part): layout}
        clip.apply([{"params": [part], "names": ["q"]}])
        flat.append(part.detach())
    assert torch.equal(torch.cat(flat).view(24, 48), parameter.detach())
    assert torch.equal(parameter.detach()[:4], weight[:4])


def test_a_logit_that_is_not_finite_shrinks_nothing():
    layer = softmax()
    clip = clip_of(layer, 1.0)
    before = layer.q_proj.weight.detach().clone()
    found = torch.full((layer.num_heads,), math.inf)
    found[0] = math.nan
    clip.measure({"train/layer0/peak/logit": found}, is_dropped=False)
    clip.apply(groups_of(layer))
    assert torch.equal(layer.q_proj.weight.detach(), before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("qk_clip=0",), "qk_clip=0: must be a number above 0"),
        (("qk_clip=100", "model/attention=linear"), "qk_clip: no layer has a softmax over its keys"),
        (("qk_clip=4", "context_length=256"), r"qk_clip=4: log\(context_length\)=5\.5"),
        (("qk_clip=100", "model/attention=vq", "model/position=none"), "qk_clip: no layer has a softmax over its keys"),
    ],
)
def test_what_cannot_be_clipped_is_refused(composed, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(composed(*overrides))
