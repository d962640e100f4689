"""The commands and figures of the README are valid."""

import re
from pathlib import Path

import pytest
from catalogue import CONF, options

from llm.config.check import check

ROOT = CONF.parent
README = (ROOT / "README.md").read_text()
PIECES = (ROOT / "docs" / "pieces.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \|[^|]*\| `([^`]+)` \|$", PIECES, flags=re.MULTILINE)
GROUPS = sorted({file.parent.relative_to(CONF).as_posix() for file in CONF.rglob("*.yaml")} - {"."})
NEEDS_MORE = ("init_from=", "resume=", "trainer=deepspeed")
"""Commands that name a folder of the reader's, or need several devices."""
COMMANDS = [c for c in re.findall(r"`python train\.py ([^`]+)`", README) if not c.startswith(("-", *NEEDS_MORE))]


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_has_a_row_in_the_table_of_pieces(group):
    commands = [command for _, command in ROWS]
    for option in options(group):
        override = f"eval=[{option}]" if group == "eval" else f"{group}={option}"
        assert any(override in command for command in commands), override


def test_every_override_in_the_table_names_an_option():
    assert len(ROWS) > 60
    for _, command in ROWS:
        for override in command.strip("'").split():
            key, _, value = override.partition("=")
            if (CONF / key).is_dir():
                assert value.strip("[]") in options(key), override


@pytest.mark.parametrize("command", COMMANDS)
def test_every_training_command_of_the_readme_is_valid(command, composed):
    check(composed(*(word.replace("'", "") for word in command.split())))


def test_no_placeholder_is_left():
    for page in [*ROOT.glob("*.md"), *Path(ROOT / "docs").glob("*.md")]:
        assert "@@" not in page.read_text(), page
