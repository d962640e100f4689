"""Tests of the report page. Those in a browser need `chromium` on the path."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm.report.page import short_names
from llm.report.report_folder import write_report
from llm.report.runs import RunReader

ROOT = Path(__file__).resolve().parents[2]
LION = {"optimizer._target_": "llm.optim.lion.Lion"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>{
const click = (node) => node.dispatchEvent(new MouseEvent("click", { bubbles: true }));
const column = (n) => [...document.querySelectorAll("#board tbody tr")].map((row) => row.children[n].textContent);
const found = { before: column(1), plots: document.querySelectorAll("svg path[stroke]").length };
const header = [...document.querySelectorAll("#board th button")].find((b) => b.textContent === "setting");
click(header); found.up = column(1); click(header); found.down = column(1);
for (const button of document.querySelectorAll("#curves [data-choice]")) click(button);
found.sections = [...document.querySelectorAll("section")].filter((s) => s.children.length).map((s) => s.id);
const svg = document.querySelector("#curves svg"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50 }));
found.tip = document.querySelector("#curves .tip").textContent;
found.difference = document.querySelector("#difference table").textContent;
found.compared = [...document.querySelectorAll("#difference select")].map((s) => s.selectedOptions[0].textContent);
found.choices = document.querySelector("#difference select").options.length;
found.runs = [...document.querySelectorAll("#runs tbody tr")].map((row) => row.innerText);
found.errors = window.errors;
document.title = JSON.stringify(found);
}</script>"""
CATCH = '<script>window.errors = []; addEventListener("error", (e) => errors.push(e.message));</script>'


@pytest.fixture
def sweep(make_run, tmp_path):
    """Write runs with everything that a report can show. One has a name that contains HTML."""
    load = {"train/layer0/expert_load_global": [0.5, 0.25, 0.25], "train/layer0/codebook_usage": 0.5}
    for seed in range(3):
        make_run(f"sweep/{seed}_adamw", loss=2.0 + 0.01 * seed, seed=seed, extra=lambda step: load)
        make_run(f"sweep/{seed + 3}_lion", loss=3.0 + 0.01 * seed, seed=seed, **LION)
    for number, (lr, batch) in enumerate([(0.002, 100), (0.001, 200), (0.002, 200)]):
        make_run(f"sweep/{number + 6}_more", loss=2.5, batch_tokens=batch, **{"optimizer.lr": lr})
    folder = make_run("sweep/9_</script><b>x", status="failed: </script><img src=x>", steps=3, **LION, seed=7)
    (folder / "eval").mkdir()
    (folder / "eval" / "extrapolation.json").write_text(
        json.dumps({"by_context": {"10": {"loss": 2.0}, "20": {"loss": 2.5}}})
    )
    (tmp_path / "sweep/10_adamw").mkdir()  # this job failed before it had a configuration
    job = {"overrides": ["optimizer.lr=-1", "seed=4"], "state": "failed", "reason": "optimizer.lr=-1: must be above 0"}
    (tmp_path / "sweep/10_adamw/job.json").write_text(json.dumps(job))
    return tmp_path / "sweep"


def test_the_page_needs_no_other_file_and_escapes_text_from_runs(sweep):
    report = write_report([sweep])
    page = report.page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "</script><b>x" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert len(data["runs"]) == 11
    assert data["refresh_seconds"] is None
    shown = {(pair["first"], pair["second"]): (pair["word"], pair["p"]) for pair in data["pairs"]}
    text = report.text
    for (first, second), (word, p) in shown.items():
        line = next(line for line in text.splitlines() if f"{first} against {second}" in line)
        assert word in line
        assert p is None or f"p = {p:.2g}" in line  # page and text show the same corrected p-value


@pytest.mark.skipif(BROWSER is None, reason="no chromium on the path")
def test_in_a_browser_tables_sort_and_plots_are_drawn_without_errors(sweep):
    page = write_report([sweep]).page
    html = page.read_text().replace("<head>", "<head>" + CATCH, 1).replace("</body>", PROBE + "</body>")
    (page.parent / "probe.html").write_text(html)
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr",
               "--window-size=1280,900", "--virtual-time-budget=2000", f"file://{page.parent}/probe.html"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(re.search(r"<title>(.*?)</title>", result.stdout, re.DOTALL).group(1).replace("&amp;", "&"))
    assert found["errors"] == []
    assert not [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert found["up"] == sorted(found["up"])
    assert found["down"] == found["up"][::-1]
    assert found["plots"] >= 6
    assert set(found["sections"]) >= {"curves", "board", "rates", "versus", "fits", "useful", "experts", "codebooks",
                                      "extrapolation", "difference", "runs"}  # fmt: skip
    assert "adamw" in found["tip"]
    assert found["compared"] == ["0_adamw", "7_more"]  # initially the two best settings
    assert "batch_tokens" in found["difference"]
    assert found["choices"] == 10  # all runs with a configuration
    (failed,) = [row.split() for row in found["runs"] if row.startswith("10_adamw")]
    assert failed == ["10_adamw", "failed", "-1", "4", *"–––––", "optimizer.lr=-1:", "must", "be", "above", "0"]


def test_the_command_writes_the_report_and_a_wrong_folder_is_one_line(sweep, tmp_path):
    call = [sys.executable, "-m", "llm.report"]
    result = subprocess.run(
        [*call, str(sweep), "--loss", "2.6"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "tokens to 2.600" in result.stdout
    assert {path.name for path in (sweep / "report").iterdir()} == {"leaderboard.csv", "index.html"}
    wrong = subprocess.run(
        [*call, str(tmp_path / "no")], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


def test_reports_need_neither_torch_nor_hydra():
    code = "import sys, llm.commands.report; sys.exit(bool({'torch', 'hydra', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_watching_writes_anew_until_every_run_has_ended(make_run, tmp_path):
    make_run("sweep/0_a")
    result = subprocess.run(
        [sys.executable, "-m", "llm.report", str(tmp_path / "sweep"), "--watch", "60"],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr  # all have ended: it does not wait for the next minute
    assert '"refresh_seconds":60.0' in (tmp_path / "sweep/report/index.html").read_text()


def test_runs_of_the_same_name_in_several_folders_get_distinct_names(make_run, tmp_path):
    first, second = make_run("a/0_run"), make_run("b/0_run", seed=1)
    runs = [RunReader().read(folder) for folder in (first, second)]
    assert short_names(runs) == ["a/0_run", "b/0_run"]
    assert short_names(runs[:1]) == ["0_run"]
