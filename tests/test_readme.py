"""What the README promises is there."""

import re
from pathlib import Path

import pytest
from catalogue import CONF, options

ROOT = CONF.parent
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \|[^|]*\| `([^`]+)` \|$", README, flags=re.MULTILINE)
PIECES = ("model/attention", "model/position", "model/ffn", "model/ffn/balance", "model/norm", "optimizer", "schedule",
          "tokenizer", "data")  # fmt: skip


@pytest.mark.parametrize("group", PIECES)
def test_every_option_has_a_row(group):
    named = {name.strip() for names, _ in ROWS for name in names.split(",")}
    assert set(options(group)) <= named


def test_every_override_in_the_table_names_an_option():
    assert len(ROWS) > 15
    for _, command in ROWS:
        for override in command.split():
            key, _, value = override.partition("=")
            if (CONF / key).is_dir():
                assert value in options(key), override


def test_every_file_the_readme_points_to_exists():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_word_is_left_to_fill_in():
    for page in [ROOT / "README.md", *Path(ROOT / "docs").glob("*.md")]:
        assert "@@" not in page.read_text(), page
