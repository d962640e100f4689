"""The table of valid pairs in docs/attention.md equals what the pieces answer; WRITE_DOCS=1 rewrites it."""

import os
import re

from attention_pairs import build_pair, reason_against
from catalogue import CONF, options

from llm.errors import ConfigError
from llm.model.position.log_n import LogN

PAGE = CONF.parent / "docs" / "attention.md"


def takes_log_n(attention, position):
    """Return whether the pair is also valid with a position that scales queries."""
    pair = build_pair(attention, position)
    pair.position.log_n = LogN(mode="full", train_length=64)
    try:
        pair.check_position(pair.position)
    except ConfigError:
        return False
    return True


def table_and_reasons():
    attentions, positions, reasons = options("model/attention"), options("model/position"), []
    lines = ["| |" + "".join(f" {a} |" for a in attentions), "|---|" + "---|" * len(attentions)]
    for position in positions:
        cells = []
        for attention in attentions:
            reason = reason_against(attention, position)
            if reason is None:
                cells.append("yes, log-n" if takes_log_n(attention, position) else "yes")
            else:
                reason = re.sub(r"^model\.position=\w+", "`model.position`", reason)
                reasons += [] if reason in reasons else [reason]
                cells.append(f"no ({reasons.index(reason) + 1})")
        lines.append(f"| {position} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines), "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))


def filled(page):
    for name, content in zip(("pairs", "reasons"), table_and_reasons(), strict=True):
        page = re.sub(
            rf"<!-- {name} -->.*?<!-- /{name} -->", f"<!-- {name} -->\n{content}\n<!-- /{name} -->", page, flags=re.S
        )
    return page


def test_the_table_of_pairs_is_what_the_pieces_answer():
    page = PAGE.read_text()
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(filled(page))
    assert page == filled(page)
