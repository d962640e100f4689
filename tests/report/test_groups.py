import math

import pytest

from llm.report.groups import group_runs, options, swept_keys, text_of
from llm.report.runs import RunReader


def read(folders):
    return [RunReader().read(folder) for folder in folders]


def test_the_smallest_set_of_keys_that_distinguishes_the_runs_is_found(make_run):
    lion = {"optimizer._target_": "llm.optim.lion.Lion", "optimizer.betas": [0.9, 0.98]}
    runs = read(
        [
            make_run("a", seed=1, compile="auto"),
            make_run("b", seed=2, compile=False, **{"optimizer.lr": 0.002}),
            make_run("c", batch_tokens=200, max_steps=5, steps=5),
            make_run("d", **lion),
            make_run("e", **lion, batch_tokens=200, max_steps=5, steps=5),
        ]
    )
    # betas follow from the class and max_steps from the batch; compile, seed and lr never split a group
    assert swept_keys(runs) == ["optimizer", "batch_tokens"]
    labels = {group.label for group in group_runs(runs, swept_keys(runs))}
    assert labels == {f"{o} batch_tokens={b}" for o in ("adamw", "lion") for b in (100, 200)}


def test_runs_that_differ_only_by_seed_and_learning_rate_are_one_group(make_run):
    runs = read([make_run(f"{lr}-{seed}", seed=seed, **{"optimizer.lr": lr}) for lr in (0.1, 0.2) for seed in (1, 2)])
    (group,) = group_runs(runs, swept_keys(runs))
    assert [(cell.lr, len(cell.runs)) for cell in group.cells] == [(0.1, 2), (0.2, 2)]
    assert group.label == "test"


def test_a_class_gets_the_name_of_the_option_that_builds_it():
    assert options("optimizer")["torch.optim.AdamW"] == "adamw"
    assert options("model/attention")["llm.model.attention.vq.VQAttention"] == "vq"
    assert options("no/such/group") == {}


def test_a_learning_rate_with_one_lucky_seed_does_not_win_over_one_with_several_seeds(make_run):
    one = make_run("lucky", loss=1.9, seed=2, **{"optimizer.lr": 0.3})
    others = [
        make_run(f"s{seed}", loss=loss, seed=seed, **{"optimizer.lr": 0.1}) for seed, loss in ((1, 2.2), (2, 1.8))
    ]
    (group,) = group_runs(read([one, *others]), [])
    assert group.best.lr == 0.1  # on the shared seed 2, 1.8 is below 1.9, although its mean over seeds is 2.0
    assert group.best.mean == pytest.approx(2.0)


def test_a_diverged_learning_rate_is_never_best_and_a_killed_run_does_not_count(make_run):
    runs = read(
        [
            make_run("good", loss=2.0, **{"optimizer.lr": 0.1}),
            make_run("nan", loss=math.inf, **{"optimizer.lr": 1.0}),
            make_run("refused", status="failed: loss=nan at step 3: not finite", **{"optimizer.lr": 2.0}),
            make_run("killed", status="failed: killed by SIGKILL", seed=5, **{"optimizer.lr": 0.1}),
        ]
    )
    (group,) = group_runs(runs, [])
    assert group.best.lr == 0.1
    assert group.best.losses == {0: 2.0}
    assert [cell.mean for cell in group.cells] == [2.0, math.inf, math.inf]


def test_values_are_formatted_as_on_a_command_line():
    assert [text_of(v) for v in (None, True, [0.9, 0.95], 1e-3, 3, "x")] == [
        "null",
        "true",
        "[0.9,0.95]",
        "0.001",
        "3",
        "x",
    ]
