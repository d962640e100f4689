import csv
import io
import math

import pytest

from llm.report.board import crossing, default_target, leaderboard, mean_curve, to_csv, to_text, verdicts
from llm.report.groups import group_runs, swept_keys
from llm.report.runs import Point, RunReader

LION = {"optimizer._target_": "llm.optim.lion.Lion"}
TIGER = {"optimizer._target_": "llm.optim.tiger.Tiger"}


def groups_of(*folders):
    runs = [RunReader().read(folder) for folder in folders]
    return group_runs(runs, swept_keys(runs))


def several(make_run, name, losses, **flat):
    return [make_run(f"{name}{seed}", loss=loss, seed=seed, **flat) for seed, loss in enumerate(losses)]


def test_the_leaderboard_ranks_by_mean_with_its_standard_error(make_run):
    groups = groups_of(*several(make_run, "adamw", [2.0, 2.2, 2.1]), *several(make_run, "lion", [3.0, 3.2], **LION))
    first, second = leaderboard(groups, target=2.5)
    assert (first.rank, first.group, first.seeds) == (1, "adamw", 3)
    assert first.loss == pytest.approx(2.1)
    assert first.standard_error == pytest.approx(0.1 / math.sqrt(3))
    # the mean falls from 6 to 2.1 in 1000 tokens, in a straight line: 2.5 is at (6 - 2.5) / (6 - 2.1)
    assert first.tokens_to_loss == pytest.approx(1000 * 3.5 / 3.9)
    assert first.seconds_to_loss == pytest.approx(20 * 3.5 / 3.9)
    assert (second.rank, second.tokens_to_loss, second.optimizer_state_bytes) == (2, None, 8000)


def test_the_default_target_is_reached_by_every_group_of_two(make_run):
    groups = groups_of(*several(make_run, "adamw", [2.0, 2.3, 2.1]), *several(make_run, "lion", [1.0, 1.2], **LION))
    target = default_target(groups)
    assert target == pytest.approx((2.0 + 2.3 + 2.1) / 3)  # the worse of two groups
    assert [row.tokens_to_loss is not None for row in leaderboard(groups, target)] == [True, True]


def test_equal_losses_show_no_difference_and_a_large_gap_is_significant(make_run):
    losses = [2.01, 2.05, 1.98]
    groups = groups_of(
        *several(make_run, "adamw", [3.0, 3.05, 2.97]),
        *several(make_run, "lion", losses, **LION),
        *several(make_run, "tiger", losses, **TIGER),
    )
    words = {(v.first, v.second): v.word for v in verdicts(groups)}
    assert words == {("lion", "tiger"): "no difference seen", ("lion", "adamw"): "better", ("tiger", "adamw"): "better"}
    assert "lion against tiger: no difference seen" in to_text(leaderboard(groups, None), verdicts(groups), None)


def test_a_group_with_one_seed_makes_no_claim(make_run):
    groups = groups_of(make_run("a", loss=2.0), make_run("b", loss=3.0, **LION))
    (verdict,) = verdicts(groups)
    assert verdict.word == "one seed, no claim"
    assert "no claim" in to_text(leaderboard(groups, None), [verdict], None)
    mixed = groups_of(*several(make_run, "c", [2.0, 2.1]), make_run("d", loss=3.0, **LION))
    assert verdicts(mixed)[0].word == "one seed, no claim"


def test_unfinished_and_diverged_groups_are_listed_without_a_rank(make_run):
    groups = groups_of(
        make_run("a", loss=2.0),
        make_run("b", status="running", steps=4, **LION),
        make_run("c", loss=math.inf, **TIGER),
    )
    rows = leaderboard(groups, default_target(groups))
    assert [(row.group, row.rank) for row in rows] == [("adamw", 1), ("tiger", None), ("lion", None)]
    assert to_text(rows, verdicts(groups), 2.0)
    assert {v.word for v in verdicts(groups)} == {"diverged"}


def test_the_csv_has_every_row_in_full_precision(make_run):
    rows = leaderboard(groups_of(make_run("a", loss=1 / 3)), None)
    (line,) = csv.DictReader(io.StringIO(to_csv(rows)))
    assert float(line["loss"]) == 1 / 3
    assert line["standard_error"] == ""


def test_a_curve_crosses_where_it_first_reaches_the_loss():
    points = [Point(0, 0, 0, 4.0), Point(10, 1, 100, 2.0), Point(20, 2, 200, 3.0), Point(30, 3, 300, 1.0)]
    assert crossing(points, 3.0) == pytest.approx((5, 0.5, 50, 3.0))
    assert crossing(points, 5.0) == points[0]
    assert crossing(points, 0.5) is None
    assert mean_curve([points, points[1:3]]) == points[1:3]
    assert mean_curve([]) == []


def test_the_loss_of_an_objective_with_a_bound_is_marked(make_run):
    objective = {"objective._target_": "llm.objective.masked_diffusion.MaskedDiffusion"}
    bound = make_run("bound", loss=3.0, summary={"bound": True}, **objective)
    rows = leaderboard(groups_of(make_run("exact", loss=2.0), bound), None)
    assert [row.is_bound for row in rows] == [False, True]
    text = to_text(rows, [], None)
    assert "<= 3.0" in text
    assert "<= 2.0" not in text
