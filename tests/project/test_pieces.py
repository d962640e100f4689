"""docs/pieces.md agrees with conf/ and the docstrings, and its overrides run."""

import sys

import pytest
from catalogue import CONF

from llm.config.check import check
from llm.errors import ConfigError

sys.path.insert(0, str(CONF.parent / "docs"))
from make_pieces import NEEDED, PAGE, first_sentence, links, page

MIXTURE = {"model/ffn/router", "model/ffn/balance"}


def overrides_of(option):
    return ["model=moe", option] if option.partition("=")[0] in MIXTURE else [option]


def test_the_page_of_pieces_is_up_to_date():
    assert PAGE.read_text() == page(), "run python docs/make_pieces.py"


@pytest.mark.parametrize("option", NEEDED)
def test_an_option_is_refused_without_its_needed_settings_and_accepted_with_them(option, composed):
    with pytest.raises(ConfigError):
        check(composed(*overrides_of(option)))
    if option != "tokenizer=pretrained":  # its folder is the reader's own
        check(composed(*overrides_of(option), *NEEDED[option].replace("'", "").split()))


def test_a_description_is_the_first_sentence_alone():
    assert first_sentence("Divides x by y, e.g. by 2.\nSecond sentence.\n\nArgs:") == "Divides x by y, e.g. by 2."


def test_each_paper_of_a_source_becomes_one_link():
    text = "Su, kexue.fm/archives/9708 and 9728; RoFormer, arXiv:2104.09864, eq. 16, and again arXiv:2104.09864."
    assert links(text) == (
        "[kexue 9708](https://kexue.fm/archives/9708), [kexue 9728](https://kexue.fm/archives/9728), "
        "[2104.09864](https://arxiv.org/abs/2104.09864)"
    )
