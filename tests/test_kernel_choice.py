"""The choice of kernels by measurement: which one wins, what is kept, and what a run records."""

import json
from dataclasses import asdict

import pytest
import torch

from llm.config.build import build_model
from llm.config.check import check
from llm.errors import ConfigError
from llm.ops import products, tuning
from llm.ops.kernel_choice import DEFAULT, KERNELS, NAMES, current, given_kernels, using
from llm.ops.tuning import CACHE, Operation, fastest, remember, remembered
from llm.training import kernel_timing
from llm.training.kernel_timing import decided_kernels
from llm.training.timed_operations import Workload, operations_of, whole_layers, workload_of
from llm.training.train import train

WORKLOAD = Workload(
    windows=4,
    context_length=32,
    matrices=((32, 32), (64, 32)),
    heads=(2, 2, 16),
    precision="32-true",
    muon_sizes=(),
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only candidates move: `clock(seconds)` returns a call that takes so long, the next time on."""
    now = [0.0]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])

    def call_of(*seconds):
        waiting = list(seconds)

        def call():
            now[0] += waiting.pop(0) if len(waiting) > 1 else waiting[0]

        return call

    return call_of


def test_the_faster_kernel_wins_by_its_smallest_time_and_the_first_call_does_not_count(clock):
    slow, noisy = clock(0.010), clock(9.0, 0.05, 0.001)
    assert fastest(Operation(name="a", candidates={"default": slow, "other": noisy})) == "other"


def test_the_default_is_kept_unless_another_kernel_is_clearly_faster(clock):
    calls = {"default": clock(0.0100), "other": clock(0.0097)}
    assert fastest(Operation(name="a", candidates=calls)) == "default"


def test_the_default_is_kept_in_a_bounded_time_where_no_time_is_reproduced(clock):
    calls = {"default": clock(*(0.05 * 1.2**n for n in range(40))), "other": clock(0.001)}
    began = tuning.time.perf_counter()
    assert fastest(Operation(name="a", candidates=calls)) == "default"
    assert tuning.time.perf_counter() - began < 1.0


def test_on_a_busy_machine_a_kernel_that_wins_nearly_every_turn_is_chosen_and_one_that_wins_half_is_not(clock):
    loads = [0.002 * 1.15**n for n in range(40)]
    turns = {"default": clock(*loads), "other": clock(*(0.8 * load for load in loads))}
    assert fastest(Operation(name="a", candidates=turns)) == "other"
    mixed = {
        "default": clock(*loads),
        "other": clock(*(load * (0.7 if n % 2 else 1.3) for n, load in enumerate(loads))),
    }
    assert fastest(Operation(name="a", candidates=mixed)) == "default"


def test_two_slow_timings_are_too_few_to_tell(clock):
    calls = {"default": clock(1.0), "other": clock(0.5)}
    assert fastest(Operation(name="a", candidates=calls)) == "default"


def test_winners_are_kept_per_machine_and_workload(tmp_path, monkeypatch):
    remember(tmp_path, WORKLOAD, {"attention": "sdpa"})
    assert remembered(tmp_path, WORKLOAD) == {"attention": "sdpa"}
    assert remembered(tmp_path, Workload(**(vars(WORKLOAD) | {"context_length": 64}))) is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert remembered(tmp_path, WORKLOAD) is None
    (tmp_path / CACHE).write_text("{")
    assert remembered(tmp_path, WORKLOAD) is None


def test_each_operation_has_the_default_first_and_candidates_that_run():
    muon = Workload(**(vars(WORKLOAD) | {"muon_sizes": (8, 16)}))
    found = operations_of(muon)
    assert {o.name for o in found} <= set(NAMES)
    assert {"product_forward", "product_grad_weight", "attention", "short_row"} <= {o.name for o in found}
    for operation in found:
        assert next(iter(operation.candidates)) == getattr(DEFAULT, operation.name)
        for call in operation.candidates.values():
            call()
    assert current() == DEFAULT


@pytest.mark.parametrize("fastest_layers", ["mkl", "mixed"])
def test_products_of_both_libraries_give_way_to_mkl_where_it_trains_layers_faster(
    monkeypatch, fastest_layers, tmp_path
):
    winners = {"product_forward": "onednn", "product_grad_input": "mkl", "product_grad_weight": "mkl"}
    monkeypatch.setattr(kernel_timing, "measure", lambda operations: dict(winners))
    monkeypatch.setattr(kernel_timing, "fastest", lambda operation: fastest_layers)
    found = kernel_timing._measured(WORKLOAD, {}, tmp_path)
    assert found["product_forward"] == ("mkl" if fastest_layers == "mkl" else "onednn")


def test_whole_layers_run_with_each_choice():
    operation = whole_layers(WORKLOAD, {"product_forward": "onednn", "product_grad_weight": "mkl"})
    assert list(operation.candidates) == ["mixed", "mkl"]
    for call in operation.candidates.values():
        call()
    assert current() == DEFAULT


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fast", "kernels=fast: unknown"),
        ({"attentoin": "sdpa"}, "did you mean attention"),
        ({"attention": "flash"}, "use one of blocked, sdpa"),
        ({"short_row": -1}, "at least 0"),
    ],
)
def test_unknown_kernels_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        given_kernels(setting)


@pytest.mark.parametrize("name", ["product_forward", "product_grad_input", "product_grad_weight"])
def test_each_product_uses_the_library_that_is_chosen_for_it(name, monkeypatch):
    counted = []
    real = products.onednn_product
    monkeypatch.setattr(products, "onednn_product", lambda a, b: counted.append(name) or real(a, b))
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    product = {"forward": products.product_nt, "grad_input": products.product_nn, "grad_weight": products.product_tn}
    multiply = product[name.removeprefix("product_")]
    with using(type(DEFAULT)(**(asdict(DEFAULT) | {name: "mkl"}))):
        without = multiply(a, b)
        assert not counted
    torch.testing.assert_close(multiply(a, b), without)
    assert counted == [name]


@pytest.fixture
def measured(monkeypatch):
    """Measure in a run of any length; return the operations that were measured."""
    found = []
    monkeypatch.setattr(kernel_timing, "WORTHWHILE_FLOPS", 0)
    monkeypatch.setattr(kernel_timing, "measure", lambda ops: found.extend(ops) or {"attention": "sdpa"})
    return found


def test_a_run_records_its_kernels_and_a_resumed_one_keeps_them(composed, tiny, tmp_path, measured):
    train(composed(*tiny, "max_steps=2", "trainer.precision=32-true"), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary[KERNELS] == asdict(DEFAULT) | {"attention": "sdpa"}
    count = len(measured)
    assert count > 0
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "last" / "manifest.json").read_text())
    assert manifest[KERNELS] == summary[KERNELS]
    checked = check(composed(*tiny, "max_steps=4", "trainer.precision=32-true"))
    model = build_model(checked.tree, 300)
    kept = decided_kernels(checked, model, tmp_path, flops_per_token=1e6, cache=tmp_path, recorded=manifest[KERNELS])
    assert asdict(kept) == manifest[KERNELS]
    assert len(measured) == count


def test_a_short_run_and_kernels_default_measure_nothing_and_given_names_hold(composed, tiny, tmp_path, measured):
    def kernels(*overrides):
        checked = check(composed(*tiny, *overrides))
        model = build_model(checked.tree, 300)
        return decided_kernels(checked, model, tmp_path, flops_per_token=1e6, cache=tmp_path / "cache", recorded=None)

    assert kernels("kernels=default") == DEFAULT
    assert kernels("kernels={short_row: 0, muon_bf16_from: 7}").short_row == 0
    assert not {"short_row", "muon_bf16_from"} & {operation.name for operation in measured}
    measured.clear()
    kernel_timing.WORTHWHILE_FLOPS = 1e18
    assert kernels() == DEFAULT
    assert not measured


def test_the_sizes_of_matrices_are_measured_for_muon_alone(composed, tiny):
    for optimizer, has_sizes in (("muon", True), ("adamw", False)):
        checked = check(composed(*tiny, f"optimizer={optimizer}"))
        assert bool(workload_of(checked, build_model(checked.tree, 300)).muon_sizes) is has_sizes
