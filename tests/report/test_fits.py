import math

import pytest

from llm.report.fits import best_rate, fit_all
from llm.report.groups import group_runs, swept_keys
from llm.report.report_folder import write_report
from llm.report.runs import RunReader


def groups_of(folders):
    runs = [RunReader().read(folder) for folder in folders]
    return group_runs(runs, swept_keys(runs))


def rate_sweep(make_run, batch, best, rates, **flat):
    """Write runs whose loss is a parabola in log lr around `best`."""
    return [
        make_run(
            f"{batch}-{lr}",
            loss=2 + math.log(lr / best) ** 2,
            batch_tokens=batch,
            **{"optimizer.lr": lr, **flat},
        )
        for lr in rates
    ]


def test_the_best_learning_rate_is_the_minimum_of_the_parabola(make_run):
    (group,) = groups_of(rate_sweep(make_run, 100, 0.0031, [0.001, 0.002, 0.004, 0.008]))
    rate, is_inside = best_rate(group) or (0, False)
    assert rate == pytest.approx(0.0031, rel=1e-9)
    assert is_inside


def test_a_best_learning_rate_at_the_edge_is_marked(make_run):
    folders = [*rate_sweep(make_run, 100, 0.01, [0.001, 0.002]), *rate_sweep(make_run, 400, 0.02, [0.01, 0.02, 0.04])]
    (fit,) = (fit for fit in fit_all(groups_of(folders)) if fit.name.startswith("best lr"))
    assert "batch_tokens=100" in fit.caution


def test_best_learning_rate_against_batch_gives_a_power_law_and_suggested_runs(make_run, tmp_path):
    folders = []
    for batch in (100, 400, 1600):
        best = 1e-3 * math.sqrt(batch / 100)
        folders += rate_sweep(make_run, batch, best, [best / 2, best, best * 2])
    (fit,) = fit_all(groups_of(folders))
    assert fit.name == "best lr against batch"
    assert fit.law.exponent == pytest.approx(0.5, abs=1e-6)  # rates are stored with six digits
    assert "batch_tokens=1600 optimizer.lr=0.004" in fit.overrides
    assert "batch_tokens=3200 optimizer.lr=0.00566" in fit.overrides
    text = write_report([folders[0].parent], out=tmp_path / "out").text
    assert (
        "  best lr against batch, all runs: optimizer.lr = 0.0001 · batch_tokens^0.500 (95 %: 0.500 to 0.500)" in text
    )
    assert "    python train.py batch_tokens=3200 optimizer.lr=0.00566\n" in text


def test_a_law_uses_learning_rates_after_scaling_and_its_suggested_runs_set_scaling_none(make_run):
    rule = {"scaling._target_": "llm.scaling.rules.sqrt", "scaling._partial_": True, "scaling.base_batch_tokens": 100}
    folders = []
    for batch in (100, 400, 1600):
        folders += rate_sweep(
            make_run, batch, 1e-3, [5e-4, 1e-3, 2e-3], **rule
        )  # the rule is right, so the best rate is the same
    (fit,) = fit_all(groups_of(folders))
    assert fit.law.exponent == pytest.approx(0.5, abs=1e-6)
    assert "scaling=none batch_tokens=1600 optimizer.lr=0.004" in fit.overrides


def test_loss_against_parameters_is_fitted_separately_per_optimizer(make_run):
    folders = []
    for target, power in (("torch.optim.AdamW", 0.1), ("llm.optim.lion.Lion", 0.2)):
        for width in (16, 32, 64):
            parameters = 1000 * width
            folders.append(
                make_run(
                    f"{target}-{width}",
                    loss=8 * parameters**-power,
                    summary={"active_parameters": parameters},
                    **{"optimizer._target_": target, "model.d_model": width},
                )
            )
    fits = {fit.subject: fit for fit in fit_all(groups_of(folders)) if fit.name == "loss against parameters"}
    assert fits["optimizer=adamw"].law.exponent == pytest.approx(-0.1, abs=1e-6)
    assert fits["optimizer=lion"].law.exponent == pytest.approx(-0.2, abs=1e-6)
    assert fits["optimizer=lion"].overrides == ["optimizer=lion model.d_model=64 optimizer.lr=0.001"]


def test_a_single_group_gives_no_law(make_run):
    assert fit_all(groups_of([make_run("a"), make_run("b", seed=1)])) == []
