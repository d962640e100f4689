"""Every page names files, folders and links that exist."""

import re

import pytest
from catalogue import CONF

ROOT = CONF.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HISTORY = {"CHANGELOG.md"}
"""Pages that also name files of earlier versions."""
EXAMPLES = {"llm/model/position/p_rope.py", "conf/model/position/p_rope.yaml"}
"""Files that a worked example creates."""
NAMED_FILE = re.compile(
    r"(?<![\w/.-])((?:llm|data|conf|tests|benchmarks|docs)/[\w./-]*\w\.(?:py|yaml|sh|md|png|json))\b"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    named = set(NAMED_FILE.findall(page.read_text()))
    missing = {path for path in named - EXAMPLES if not (ROOT / path).exists()}
    assert not missing or page.name in HISTORY


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page):
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_pattern_finds_the_files_of_a_page():
    found = NAMED_FILE.findall("see `llm/ops/loss.py`, docs/moe.md and llm/attention/kernels/old.py.")
    assert found == ["llm/ops/loss.py", "docs/moe.md", "llm/attention/kernels/old.py"]


def test_every_module_that_a_page_runs_exists():
    for page in PAGES:
        for name in re.findall(r"python -m ((?:llm|data)[\w.]*)", page.read_text()):
            path = ROOT / name.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name}: {name}"
