"""The heads that attentions declare per projection, as optimizers with one update per head read them."""

import pytest
import torch
from attention_pairs import VALID_PAIRS, build_pair
from catalogue import options

from llm.config.build import build_model
from llm.contracts import HeadStack
from llm.optim.param_groups import build_param_groups

POSITION_OF = dict(reversed(VALID_PAIRS))
every_attention = pytest.mark.parametrize("attention", options("model/attention"))


@every_attention
def test_the_groups_of_a_model_count_query_and_key_value_heads(composed, attention):
    position = {"vq": "none"}.get(attention, "rope")
    model = build_model(
        composed(
            f"model/attention={attention}", f"model/position={position}", "model.d_model=32", "model.num_layers=2",
            "model.num_heads=4", "model.num_kv_heads=2",
        ),
        100,
    )  # fmt: skip
    groups = build_param_groups(model, lr=1.0, weight_decay=0.0)
    heads = {name: n for group in groups for name, n in zip(group["names"], group["heads"], strict=True)}
    for layer in ("layers.0", "layers.1"):
        counts = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": -4}
        assert {name: heads[f"{layer}.attention.{name}.weight"] for name in counts} == counts
    others = [n for name, n in heads.items() if ".attention." not in name or not name.endswith("_proj.weight")]
    assert others
    assert set(others) == {1}


@every_attention
def test_a_block_of_rows_is_one_head_and_a_block_of_columns_reads_one_head(attention):
    layer = build_pair(attention, POSITION_OF[attention])
    assert isinstance(layer, HeadStack)
    declared, x = layer.parameter_heads, torch.randn(1, 3, 48)
    assert set(declared) == {name for name, _ in layer.named_parameters() if name.endswith("_proj.weight")}
    for name, projected in zip(("q_proj", "k_proj", "v_proj"), layer.project(x), strict=True):
        weight, count = layer.get_submodule(name).weight, declared[f"{name}.weight"]
        assert projected.shape[2] == count
        with torch.no_grad():
            weight.chunk(count)[1].zero_()
        changed = dict(zip(("q_proj", "k_proj", "v_proj"), layer.project(x), strict=True))[name]
        assert (changed == 0).all(-1)[0, 0].tolist() == [head == 1 for head in range(count)]
    assert layer.o_proj.weight.shape[1] == -declared["o_proj.weight"] * layer.head_dim
