"""docs/python.md prints what it says, in a script and in a notebook."""

import contextlib
import io
import itertools
import logging
import re

import nbformat
import pytest
from catalogue import CONF
from nbclient import NotebookClient

PAGE = (CONF.parent / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", PAGE, flags=re.DOTALL)
NUMBER = re.compile(r"-?\d[\d_]*(?:\.\d+)?(?:e-?\d+)?")
TOLERANCE = 0.15
"""Relative difference of numbers with a decimal point: the page rounds them, and losses differ between processors."""


def agrees(stated, printed):
    """Whether a printed line is the stated one. An ellipsis stands for any text, and losses are compared as numbers."""
    parts = [part.strip() for part in stated.split("…")]
    pattern = r".*?".join(r"\s+".join(map(_token, part.split())) for part in parts)
    match = re.fullmatch(rf"\s*{pattern}\s*", printed)
    wanted = [n for n in NUMBER.findall(stated) if "." in n]
    return match is not None and all(
        float(found) == pytest.approx(float(n), rel=TOLERANCE) for n, found in zip(wanted, match.groups(), strict=True)
    )


def _token(word):
    pieces = NUMBER.split(word)
    numbers = [rf"({NUMBER.pattern})" if "." in n else re.escape(n) for n in NUMBER.findall(word)]
    return "".join(re.escape(piece) + number for piece, number in itertools.zip_longest(pieces, numbers, fillvalue=""))


def compare(stated, printed):
    """Match stated lines with printed ones; a line with an ellipsis alone stands for any number of lines."""
    lines = printed.splitlines()
    position, is_open = 0, False
    for line in stated.splitlines():
        if line.strip() == "…":
            is_open = True
            continue
        found = next((i for i in range(position, len(lines)) if agrees(line, lines[i])), None)
        assert found is not None, f"{line!r} is not in {lines[position:]}"
        assert is_open or found == position, f"{lines[position]!r} is in place of {line!r}"
        position, is_open = found + 1, False
    assert is_open or position == len(lines), lines[position:]


def test_each_block_of_the_page_prints_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.root, "handlers", [])
    assert len(BLOCKS) >= 8
    names: dict[str, object] = {}
    for code, stated in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/python.md", "exec"), names)
        if "corpus  " not in printed.getvalue():
            compare(stated, printed.getvalue())
        else:
            lines = [line for line in printed.getvalue().splitlines() if not line.startswith("corpus ")]
            compare(stated, "\n".join(lines))


@pytest.mark.parametrize(
    ("stated", "printed", "is_equal"),
    [
        ("loss 2.5  … left", "loss 2.41  1,000 tokens/s  0:00 left", True),
        ("loss 2.5  … left", "loss 3.5  1,000 tokens/s  0:00 left", False),
        ("steps 60", "steps 61", False),
        ("array([2.5, 2.4])", "array([2.45672, 2.4123])", True),
    ],
)
def test_the_comparison_of_lines_finds_other_numbers(stated, printed, is_equal):
    assert agrees(stated, printed) is is_equal


def test_a_notebook_shows_progress_curves_and_the_figures_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(CONF.parent))
    settings = ["data=synthetic", "model.num_layers=1", "model.d_model=32", "context_length=32", "batch_tokens=256"]
    settings += ["max_steps=2", "trainer=cpu", "callbacks.samples=null", "loader.val_tokens=512"]
    cells = [f"import llm\nrun = llm.train(llm.compose(*{settings}))", "run"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    trained, shown = (cell.outputs for cell in notebook.cells)
    printed = "".join(output.text for output in trained if output.output_type == "stream")
    assert "step 2/2  loss" in printed
    pictures = [output.data for output in trained if output.output_type == "display_data"]
    assert [set(data) & {"image/png"} for data in pictures] == [{"image/png"}]
    assert "val/loss" in shown[0].data["text/html"]
