"""Larger decoders from trained ones: the same function at the start, duplicates that diverge, and refusals."""

import itertools
import json
import shutil

import pytest
import torch

from llm.adapt.depth_growth import DepthGrowth
from llm.adapt.width_growth import WidthGrowth, duplicates, head_duplicates
from llm.config.build import build_model
from llm.config.check import check
from llm.errors import CheckpointError, ConfigError
from llm.training.grown import TOLERANCE_OF_GROWTH, largest_difference
from llm.training.rebuild import rebuild_model
from llm.training.train import train

SMALL = ("model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.ffn.d_ff=48",
         "context_length=16", "batch_tokens=16", "micro_batch_size=1", "loader.val_tokens=16")  # fmt: skip
WIDE = ("model.d_model=64", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn.d_ff=81")
DEEP = ("model.num_layers=5",)
KINDS = {
    "dense": (),
    "head of its own": ("model.tie_embeddings=false",),
    "layer norm": ("model/norm=layer", "model.norm.bias=true"),
    "qk_norm": ("model.attention.qk_norm=true",),
    "experts": ("model=moe", "model.ffn.num_experts=4", "model.ffn.top_k=2", "model.ffn.num_shared_experts=1"),
    "masked": ("objective=masked",),
    "uniform": ("objective=uniform",),
    "biases": ("model.attention.bias=all", "model.ffn.bias=true"),
    "factors": ("model.low_rank={q_proj:4,o_proj:5,up_proj:6}",),
    "linear attention": ("model/attention=linear",),
}
VOCAB = 40


def random_model(composed, *overrides):
    """A decoder in which no weight has a value that hides a mistake: gains and biases are random as well."""
    model = build_model(composed(*SMALL, *overrides), VOCAB).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def grown(composed, growth, kind, larger):
    source = random_model(composed, *KINDS[kind]).double()
    target = build_model(composed(*SMALL, *KINDS[kind], *larger), VOCAB).eval().double()
    target.load_state_dict(growth(source, target))
    return source, target, check(composed(*SMALL, *KINDS[kind], *larger))


@pytest.mark.parametrize(("kind", "split"), [*((kind, "random") for kind in KINDS), ("dense", "even")])
def test_a_wider_decoder_computes_the_same(composed, kind, split):
    source, target, checked = grown(composed, WidthGrowth(split=split), kind, WIDE)
    assert target.d_model == 2 * source.d_model
    assert largest_difference(checked, source, target) < 1e-12  # weights in fp64; those in fp32 are rounded


@pytest.mark.parametrize("kind", KINDS)
def test_a_deeper_decoder_with_identity_layers_computes_the_same(composed, kind):
    source, target, checked = grown(composed, DepthGrowth(new_layers="identity"), kind, DEEP)
    assert largest_difference(checked, source, target) == 0.0


def test_copied_layers_are_those_of_the_whole_stack_and_change_the_function(composed):
    source, target, checked = grown(composed, DepthGrowth(new_layers="copy"), "dense", DEEP)
    for index, layer in enumerate(target.layers):
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(tensor, source.layers[index % 2].state_dict()[name], rtol=0, atol=0)
    assert largest_difference(checked, source, target) > 1e3 * TOLERANCE_OF_GROWTH


def test_identity_layers_follow_the_layer_that_they_copy(composed):
    source, target, _ = grown(composed, DepthGrowth(new_layers="identity"), "dense", DEEP)
    origins = [0, 0, 0, 1, 1]
    for index, (layer, origin) in enumerate(zip(target.layers, origins, strict=True)):
        weight = source.layers[origin].attention.q_proj.weight
        torch.testing.assert_close(layer.attention.q_proj.weight, weight, rtol=0, atol=0)
        is_new = index in (1, 2, 4)
        assert bool((layer.attention.o_proj.weight == 0).all()) == is_new
        assert bool((layer.ffn.down_proj.weight == 0).all()) == is_new


def test_one_factor_of_a_new_layer_is_not_zero_so_that_the_other_learns(composed):
    _, target, _ = grown(composed, DepthGrowth(new_layers="identity"), "factors", DEEP)
    projection = target.layers[1].attention.o_proj
    assert bool((projection.second.weight == 0).all())
    assert bool((projection.first.weight != 0).any())


@pytest.mark.parametrize(("split", "diverge"), [("random", True), ("even", False)])
def test_random_shares_give_duplicates_gradients_of_other_directions(composed, split, diverge):
    _, target, _ = grown(composed, WidthGrowth(split=split), "dense", WIDE)
    ids = torch.randint(VOCAB, (2, 16))
    hidden = target(ids, positions=torch.arange(16).expand(2, 16)).hidden
    torch.nn.functional.cross_entropy(target.logits(hidden).flatten(0, 1), ids.flatten()).backward()
    gradient = target.layers[0].ffn.up_proj.weight.grad
    first, second = gradient[:33], gradient[48:81]  # hidden units 48 to 80 are duplicates of 0 to 32
    cosines = torch.nn.functional.cosine_similarity(first, second, dim=1)
    assert bool((cosines < 0.999).all()) == diverge
    assert bool((cosines > 0.999999).all()) != diverge


def test_duplicated_heads_keep_their_key_value_head():
    for (kv, group), more_kv, more_group in itertools.product([(1, 2), (2, 2), (3, 1)], (1, 2, 3, 6), (1, 2, 4)):
        if more_kv < kv or more_group < group:
            continue
        heads = head_duplicates((kv * group, kv), (more_kv * more_group, more_kv))
        new_kv = torch.arange(more_kv * more_group) // more_group
        assert torch.equal(heads // group, duplicates(kv, more_kv)[new_kv])
        assert set(heads.tolist()) == set(range(kv * group))


@pytest.mark.parametrize(
    ("growth", "larger", "message"),
    [
        (WidthGrowth(split="random"), ("model.d_model=48",), "model.d_model=48 must be a multiple of the run's 32"),
        (WidthGrowth(split="random"), ("model.d_model=64",), "head_dim=32, and the run has 16.*model.num_heads=4"),
        (WidthGrowth(split="random"), ("model.num_kv_heads=2",), "2 heads on 2 key/value heads do not contain"),
        (WidthGrowth(split="random"), ("model.num_layers=3",), "the run has no weight layers.2"),
        (DepthGrowth(new_layers="copy"), (), "model.num_layers=2 must be above the run's 2"),
        (
            DepthGrowth(new_layers="copy"),
            (*DEEP, "model.ffn.d_ff=64"),
            "gate_proj.weight is .48, 32. in the",
        ),
    ],
)
def test_sizes_that_cannot_be_reached_are_refused(composed, growth, larger, message):
    source, target = random_model(composed), build_model(composed(*SMALL, *larger), VOCAB)
    with pytest.raises(ConfigError, match=message):
        growth(source, target)


@pytest.fixture(scope="module")
def trained_small(composed, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "run"
    train(composed(*tiny, "max_steps=4", "callbacks.samples=null"), folder)
    return folder


def overriding(tiny, *overrides):
    names = {override.split("=")[0] for override in overrides}
    return [*(setting for setting in tiny if setting.split("=")[0] not in names), *overrides]


@pytest.mark.parametrize(("grow", "larger"), [("depth", ("model.num_layers=4",)), ("width", WIDE)])
def test_a_run_begins_with_the_loss_of_the_smaller_one_and_resumes(
    trained_small, composed, tiny, tmp_path, caplog, grow, larger
):
    given = overriding(tiny, *larger, f"init_from={trained_small}", f"grow={grow}", "callbacks.samples=null")
    short = overriding(given, "max_steps=1", "val_every=1", "optimizer.lr=1e-12")
    with caplog.at_level("INFO"):
        loss = train(composed(*short), tmp_path / "first")
    assert "largest difference of scores" in caplog.text
    before = rebuild_model(trained_small, "last")
    after = rebuild_model(tmp_path / "first", "last")
    assert largest_difference(after.config, before.model, after.model) < 1e-6
    assert loss == pytest.approx(train_loss(trained_small), abs=2e-2)  # the runs multiply in bf16

    whole = train(composed(*overriding(given, "max_steps=6")), tmp_path / "whole")
    train(composed(*overriding(given, "max_steps=3", "checkpoint_every=3", "schedule=constant")), tmp_path / "part")
    again = composed(*overriding(given, "max_steps=6", "schedule=constant", f"resume={tmp_path / 'part'}"))
    straight = train(composed(*overriding(given, "max_steps=6", "schedule=constant")), tmp_path / "straight")
    assert train(again, tmp_path / "part") == straight != whole


def train_loss(folder):
    return json.loads((folder / "summary.json").read_text())["val/loss"]


def test_a_hybrid_decoder_whose_layers_would_change_their_kind_is_refused(composed, tiny, tmp_path):
    kept = [*(t for t in tiny if not t.startswith("model.ffn")), "model.ffn.d_ff=48", "model=hybrid"]
    given = (*kept, "model.attention.kinds.local.window=3", "model.attention.pattern=[local,softmax]", "max_steps=1")
    train(composed(*given, "callbacks.samples=null"), tmp_path / "first")
    with pytest.raises(ConfigError, match=r"grow: the larger decoder's scores differ from the run's by"):
        train(
            composed(*overriding(given, "model.num_layers=4"), f"init_from={tmp_path / 'first'}", "grow=depth"),
            tmp_path / "second",
        )


def test_growth_needs_a_run_folder(composed, tiny, trained_small, tmp_path):
    with pytest.raises(ConfigError, match="grow: needs the weights of a trained run; add init_from="):
        check(composed(*tiny, "grow=depth"))
    shutil.copytree(trained_small / "checkpoints/last", tmp_path / "b/c/copy")
    with pytest.raises(CheckpointError, match=r"init_from=.*copy: grow= needs the config.yaml"):
        train(
            composed(*overriding(tiny, "model.num_layers=4"), f"init_from={tmp_path / 'b/c/copy'}", "grow=depth"),
            tmp_path / "c",
        )
