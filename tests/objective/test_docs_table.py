"""The table in docs/objectives.md equals what attentions and positions answer; WRITE_DOCS=1 rewrites it."""

import os
import re

from attention_pairs import VALID_PAIRS, build_pair
from catalogue import CONF, options
from hydra.utils import instantiate
from omegaconf import OmegaConf

from llm.errors import ConfigError

PAGE = CONF.parent / "docs" / "objectives.md"


def reason_against_sight(attention, position, sight):
    """Return why a pair does not serve a sight, empty where it does."""
    try:
        build_pair(attention, position).check_sight(sight)
    except ConfigError as error:
        return re.sub(r"^model\.position=\w+: ", "", str(error)).partition(";")[0]
    return ""


def table_and_reasons():
    nodes = {name: OmegaConf.load(CONF / "objective" / f"{name}.yaml") for name in options("objective")}
    built = {name: instantiate(node)(vocab_size=64, bos_id=0) for name, node in nodes.items()}
    lines, reasons = ["| attention | position |" + "".join(f" {name} |" for name in built)], []
    lines.append("|---|---|" + "---|" * len(built))
    for attention, position in VALID_PAIRS:
        cells = []
        for objective in built.values():
            reason = reason_against_sight(attention, position, objective.sight)
            reasons += [reason] if reason and reason not in reasons else []
            cells.append(f"no ({reasons.index(reason) + 1})" if reason else "yes")
        lines.append(f"| {attention} | {position} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines), "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))


def filled(page):
    for name, content in zip(("triples", "reasons"), table_and_reasons(), strict=True):
        block = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
        page = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, page, flags=re.S)
    return page


def test_the_table_of_triples_is_what_the_pieces_answer():
    page = PAGE.read_text()
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(filled(page))
    assert page == filled(page)
    assert "| softmax | rope | yes |" in page
