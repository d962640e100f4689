from pathlib import Path

import pytest

from llm.config.signatures import check_node, fits, locate, target_nodes


def node(**values):
    return {"_target_": "llm.model.ffn.swiglu.SwiGLU", "_partial_": True, **values}


def test_a_good_node_has_no_problem():
    assert check_node("model.ffn", node(d_ff=64)) == []


def test_a_misspelt_key_gets_the_nearest_key_as_suggestion():
    (problem,) = check_node("model.ffn", node(dff=64))
    assert problem == "model.ffn.dff=64: unknown key; did you mean d_ff?"


def test_a_key_of_another_project_is_translated():
    adamw = {"_target_": "torch.optim.AdamW", "_partial_": True, "learning_rate": 1e-3}
    (problem,) = check_node("optimizer", adamw)
    assert problem.endswith("did you mean lr?")


def test_a_value_of_another_type_names_key_value_and_type():
    (problem,) = check_node("model.ffn", node(d_ff="wide"))
    assert problem == "model.ffn.d_ff='wide': must be int; got str"


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [("_partial_", 0.5, "bool; got float"), ("_convert_", "any", "one of none | partial | object | all; got str")],
)
def test_a_hydra_key_with_an_invalid_value_is_reported_with_other_mistakes(key, value, rule):
    problems = check_node("optimizer", {"_target_": "llm.optim.lion.Lion", "_partial_": True, "wd": 1, key: value})
    assert sorted(problems) == [
        f"optimizer.{key}={value!r}: must be {rule}",
        "optimizer.wd=1: unknown key; did you mean weight_decay?",
    ]


def test_the_error_of_a_missing_value_says_how_to_set_it():
    (problem,) = check_node("model.ffn", node(d_ff="???"))
    assert "add model.ffn.d_ff=" in problem


def test_a_whole_piece_that_lacks_an_argument_is_found():
    whole = {"_target_": "llm.model.ffn.swiglu.SwiGLU", "d_ff": 64}
    assert check_node("ffn", whole) == ["ffn.d_model: missing; llm.model.ffn.swiglu.SwiGLU needs it"]
    assert check_node("ffn", whole, supplied=frozenset({"d_model"})) == []


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "builtins.exec", "subprocess.Popen", "torch.hub.load", 3]
)
def test_a_target_outside_the_allow_list_is_refused_without_importing_it(target):
    (problem,) = check_node("model", {"_target_": target})
    assert "not on the allow-list" in problem


def test_a_target_that_does_not_exist_is_named():
    (problem,) = check_node("model.ffn", {"_target_": "llm.model.ffn.swiglu.SwigLU"})
    assert "cannot be imported" in problem


def test_nodes_are_found_at_any_depth():
    tree = {"a": {"_target_": "x", "b": [{"_target_": "y"}]}, "c": {"d": {"_target_": "z"}}}
    assert [path for path, _ in target_nodes(tree)] == ["a", "a.b[0]", "c.d"]


def test_a_method_of_a_class_can_be_located():
    assert locate("llm.model.ffn.swiglu.SwiGLU.flops_per_token").__name__ == "flops_per_token"


@pytest.mark.parametrize(
    ("value", "hint", "answer"),
    [
        (1, float, True),
        (True, int, False),
        (1, bool, False),
        (1.5, int, False),
        (None, int | None, True),
        ([0.9, 0.95], tuple[float, float], True),
        ([], tuple[float, float], False),
        ([0.9, "a"], tuple[float, float], False),
        ([1, 2, 3], tuple[int, ...], True),
        ("a", list, False),
        ({"_target_": "x"}, int, True),
        ({"a": 1}, int, False),
        ({}, str | None, False),
        (0, Path | None, False),
        ("x", str | Path, True),
    ],
)
def test_values_are_checked_against_type_hints(value, hint, answer):
    assert fits(value, hint) is answer
