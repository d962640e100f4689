"""The memory forecast of plan=true, compared with the peak memory of a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "adamw": ("optimizer=adamw",),
    "muon": ("optimizer=muon",),
    "moe-lion": ("optimizer=lion", "model=moe", "model.ffn.num_experts=4"),
}
SLOW = {"sgd": ("optimizer=sgd",), "tiger": ("optimizer=tiger",), "moe-muon": ("optimizer=muon", "model=moe")}
SIZE = (
    "model/size=small",
    "micro_batch_size=8",
    "context_length=256",
    "batch_tokens=2048",
    "max_steps=2",
    "val_every=2",
)

MEASURE = """
import json, os, sys
from pathlib import Path
from llm.config.check import check
from llm.training import memory_forecast
from llm.training.plan import describe_plan
from llm.training.train import train

for name, config in json.load(open(sys.argv[1])).items():
    if os.fork():  # a child per case: libraries are imported once, and peaks stay apart
        os.wait()
        continue
    folder = Path(sys.argv[2], name)
    folder.mkdir()
    kept = {}
    memory_forecast.format_bytes = lambda value: value
    memory_forecast.format_table = lambda header, rows: kept.update(rows) or ""
    checked = check(config)
    describe_plan(checked)
    Path("/proc/self/clear_refs").write_text("5")
    train(checked, folder)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    (folder / "peak.json").write_text(json.dumps([kept["all"], int(peak.split()[1]) * 1024]))
    os._exit(0)
"""


@pytest.fixture(scope="module")
def measure(composed, tiny, tmp_path_factory):
    """Return a function that trains cases in processes of their own; it returns (forecast, measured) bytes by case."""

    def run(cases):
        folder = tmp_path_factory.mktemp("memory")
        kept = [t for t in tiny if not t.startswith(("model.", "context", "batch", "micro", "max_steps", "val_every"))]
        configs = {name: composed(*kept, *SIZE, "callbacks.samples=null", *case) for name, case in cases.items()}
        (folder / "cases.json").write_text(json.dumps(configs))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", MEASURE, str(folder / "cases.json"), str(folder)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return {name: json.loads((folder / name / "peak.json").read_text()) for name in cases}

    return run


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("cases", [CASES, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["usual", "others"])
def test_the_forecast_is_within_fifteen_percent_of_the_measured_peak(measure, cases):
    for name, (forecast, measured) in measure(cases).items():
        assert forecast == pytest.approx(measured, rel=0.15), name
