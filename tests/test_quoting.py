from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llm.commands.compose import value_of
from llm.config.quoting import quote


@given(st.text(alphabet="ab\\'\"${}=,[]() :;#é日\t", max_size=12))
@example("runs/lr=1e-3,seed=1")
@example("it's \\${now}\\")
def test_hydra_reads_a_quoted_text_exactly(text):
    config = OmegaConf.create({"key": OverridesParser.create().parse_override(f"key={quote(text)}").value()})
    assert config.key == text


def test_a_path_on_a_command_line_is_read_with_and_without_quotes():
    for text in ("runs/a", "it's", "lr=1e-3,seed=1", "日 本"):
        assert value_of("resume", ["seed=1", f"resume={quote(text)}"]) == text
        assert value_of("resume", ["resume=other", f"resume={text}"]) == text
    assert value_of("resume", ["resumed=1"]) is None
