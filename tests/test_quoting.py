import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llm.commands.arguments import as_text, parse_command_line, parse_override
from llm.config.quoting import quote


@given(st.text(alphabet="ab\\'\"${}=,[]() :;#é日\t", max_size=12))
@example("runs/lr=1e-3,seed=1")
@example("it's \\${now}\\")
def test_hydra_reads_a_quoted_text_exactly(text):
    config = OmegaConf.create({"key": OverridesParser.create().parse_override(f"key={quote(text)}").value()})
    assert config.key == text


@pytest.mark.parametrize(
    "text", ["runs/a", "it's", "lr=1e-3,seed=1", "日 本", "my dïr/run 1", "~/x", "1e-3", "2026", "a,b", "a ", " a"]
)
def test_a_path_is_read_as_the_shell_hands_it_over_and_with_quotes(text):
    for key in ("resume", "hydra.run.dir", "run_dir"):
        assert parse_override(as_text(f"{key}={text}")).value() == text
        assert parse_override(as_text(f"{key}={quote(text)}")).value() == text


def test_paths_in_brackets_and_sweeps_over_paths_stay_what_they_are(tmp_path):
    (listed,) = parse_command_line(["data.files=[a.txt,b.txt]"], "train").overrides
    assert parse_override(listed).value() == ["a.txt", "b.txt"]
    assert parse_command_line(["-m", "resume=a,b"], "train").overrides == ("resume=a,b",)
    assert parse_command_line(["resume=null", "seed=1"], "train").overrides == ("resume=null", "seed=1")
    (file,) = parse_command_line([f"data.files={tmp_path}/a,b.txt"], "train").overrides
    assert parse_override(file).is_sweep_override()  # no such file
    (tmp_path / "a,b.txt").write_text("text")
    (file,) = parse_command_line([f"data.files={tmp_path}/a,b.txt"], "train").overrides
    assert parse_override(file).value() == f"{tmp_path}/a,b.txt"
    (file,) = parse_command_line(["data.files=日本.txt"], "train").overrides
    assert parse_override(file).value() == "日本.txt"
