import json

import pytest

from llm.report.groups import group_runs, swept_keys
from llm.report.report_folder import write_report
from llm.report.runs import RunReader
from llm.report.useful_batch import useful_batches, useful_text

UPDATES, BATCH = 40, 400
"""The minimum of updates and the useful batch of the runs below."""
RAMP = {"batch_schedule._target_": "llm.scaling.batch_schedule.doubling"}


def found_in(folders):
    runs = [RunReader().read(folder) for folder in folders]
    return useful_batches(group_runs(runs, swept_keys(runs)))


def on_the_hyperbola(make_run, batches, prefix="", **flat):
    """Write runs that reach a loss of 2.0 in the number of updates that their batch needs."""
    for batch in batches:
        steps = round(UPDATES * (1 + BATCH / batch))
        yield make_run(f"{prefix}{batch}", steps=steps, max_steps=steps, batch_tokens=batch, **flat)


def test_a_measured_noise_scale_gives_the_useful_batch_and_compares_the_run_with_it(make_run):
    folders = [make_run(str(seed), seed=seed, summary={"noise_scale": scale}) for seed, scale in enumerate((20, 80))]
    (useful,) = found_in(folders)
    assert useful.tokens == pytest.approx(40)  # the geometric mean of two seeds
    assert useful.lines == [
        "test: useful batch 40 tokens, by the noise scale measured while training",
        "  batch_tokens=100: 2.5 x the useful batch, past it: 3.5 x the fewest tokens, 1.4 x the fewest updates",
    ]


def test_a_noise_scale_from_the_scaling_rule_is_used_unless_it_says_measured(make_run):
    given = make_run("given", **{"scaling.noise_scale": 1000.0})
    (useful,) = found_in([given])
    assert "by the noise scale of scaling.noise_scale" in useful.lines[0]
    assert "0.1 x the useful batch, below it: 1.1 x the fewest tokens, 11 x the fewest updates" in useful.lines[1]
    assert found_in([make_run("probed", **{"scaling.noise_scale": "measured"})]) == []
    assert found_in([make_run("none", summary={"noise_scale": None})]) == []


def test_a_sweep_over_batches_recovers_the_hyperbola_of_its_runs(make_run):
    (useful,) = found_in(on_the_hyperbola(make_run, [100, 400, 1600]))
    assert useful.tokens == pytest.approx(BATCH, rel=1e-6)
    assert useful.trade is not None
    assert useful.trade.min_updates == pytest.approx(UPDATES, rel=1e-6)
    assert useful.points == [pytest.approx(point) for point in [(200, 20_000), (80, 32_000), (50, 80_000)]]
    assert useful.lines[0] == (
        "all runs: useful batch 400 tokens, by the sweep, to loss 2.000; at least 40 updates, at least 16k tokens"
    )
    assert "batch_tokens=1600: 4 x the useful batch, past it" in useful.lines[3]
    assert useful.caution == ""


def test_each_optimizer_of_a_sweep_gets_its_own_estimate(make_run):
    lion = {"optimizer._target_": "llm.optim.lion.Lion"}
    runs = [*on_the_hyperbola(make_run, [100, 400], "a"), *on_the_hyperbola(make_run, [100, 400], "b", **lion)]
    found = found_in(runs)
    assert sorted(useful.subject for useful in found) == ["optimizer=adamw", "optimizer=lion"]
    assert all("two batches" in useful.caution for useful in found)


def test_runs_that_determine_no_useful_batch_give_the_reason(make_run):
    (seldom,) = found_in([make_run(f"s{b}", steps=2, max_steps=2, batch_tokens=b) for b in (100, 200)])
    assert seldom.lines == [
        "all runs: no useful batch from the sweep, to loss 2.000: batch_tokens=100,200: no validation before that "
        "loss; lower val_every"
    ]
    (flat,) = found_in([make_run(f"f{b}", steps=20, max_steps=20, batch_tokens=b) for b in (100, 200)])
    assert "lie on no hyperbola" in flat.caution  # the same number of updates for each batch
    ramps = [make_run(f"r{b}", steps=20, max_steps=20, batch_tokens=b, **RAMP) for b in (100, 200)]
    assert found_in(ramps) == []


def test_the_report_shows_the_useful_batch_in_its_text_and_on_its_page(make_run, tmp_path):
    list(on_the_hyperbola(make_run, [100, 400, 1600], "sweep/"))
    report = write_report([tmp_path / "sweep"])
    assert "Useful batch: (S/S_min - 1)(E/E_min - 1) = 1\n  all runs: useful batch 400 tokens" in report.text
    data = json.loads(report.page.read_text().split('id="data">')[1].split("</script>")[0])
    assert data["useful"][0]["trade"]["min_updates"] == pytest.approx(UPDATES)
    assert useful_text([]) == ""
