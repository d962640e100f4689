import ast
import re
from pathlib import Path

import pytest
from catalogue import CONF

from llm.config.files import save
from llm.config.safety import escaping_paths, is_secret_key, secrets_in, secrets_on_the_command_line
from llm.config.signatures import ALLOWED_TARGETS, check_node
from llm.errors import ConfigError
from llm.training.rebuild import read_config

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for package in ("llm", "data") for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize(
    "key", ["api_key", "wandb_key", "hf_token", "token", "password", "auth", "logger.secret", "APIKEY"]
)
def test_a_key_that_names_a_secret_is_known(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["batch_tokens", "max_tokens", "bos_token", "val_tokens", "max_new_tokens", "tokenizer", "keep", "key_size"]
)
def test_a_key_that_counts_or_names_tokens_is_no_secret(key):
    assert not is_secret_key(key)


def test_no_setting_of_this_project_is_taken_for_a_secret(composed):
    assert secrets_in(composed(), environment={}) == []


def test_secrets_are_found_by_key_by_url_and_by_the_environment_and_never_shown():
    config = {
        "logger": {"wandb_key": "hunter2hunter2"},
        "data": {"path": "https://me:hunter2hunter2@host/x"},
        "tokenizer": {"path": ["hunter2hunter2"]},
    }
    problems = secrets_in(config, environment={"HF_TOKEN": "hunter2hunter2", "KEY": "short"})
    assert [problem.split("=")[0] for problem in problems] == ["logger.wandb_key", "data.path", "tokenizer.path[0]"]
    assert "hunter2" not in "".join(problems)
    assert "$HF_TOKEN" in problems[2]


@pytest.mark.parametrize(
    "argument",
    [
        "+wandb_key=hunter2", "++logger.api_key=hunter2", "--wandb-api-key=hunter2", "+x=${oc.env:HF_TOKEN}",
        "data.path=https://me:hunter2@host/x",
    ],
)  # fmt: skip
def test_a_secret_on_the_command_line_is_refused_without_repeating_it(argument):
    (problem,) = secrets_on_the_command_line([argument])
    assert "secrets do not belong" in problem
    assert "hunter2" not in problem


def test_ordinary_overrides_and_unset_secrets_are_accepted():
    arguments = [
        "batch_tokens=16k",
        "data.files=a=b",
        "tokenizer.bos_token=<s>",
        "+x=${oc.env:HOME}",
        "logger.api_key=null",
    ]
    assert secrets_on_the_command_line(arguments) == []


def test_every_number_of_tokens_that_conf_has_may_be_set_on_the_command_line():
    files = (ROOT / "conf").rglob("*.yaml")
    keys = {key for file in files for key in re.findall(r"^ *([a-z_]*tokens):", file.read_text(), re.MULTILINE)}
    assert {"batch_tokens", "every_tokens", "pair_tokens"} <= keys
    for value in ("500000", "500_000,1e6", "[0,200]"):
        assert secrets_on_the_command_line([f"some.group.{key}={value}" for key in keys]) == []
    assert secrets_on_the_command_line(["+some.tokens=hf_abcdefgh"])


@pytest.mark.parametrize("value", ["../../etc/x", "/etc/x", "a/../../x", "~/x"])
def test_file_names_that_leave_the_run_folder_are_refused(composed, value):
    node = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": value}
    (problem,) = escaping_paths({"callbacks": {"more": node}})
    assert problem.startswith(f"callbacks.more.filename={value}: leads out of the run folder")
    assert escaping_paths({"callbacks": {"more": node | {"filename": "sub/x"}}}) == []


@pytest.mark.parametrize(
    "target",
    [
        "llm.distributed.launch.start_processes", "llm.distributed.launch.subprocess.Popen",
        "llm.run_folder.checkpoint_files.remove_checkpoint",
        "llm.callbacks.wandb_logger.os.system", "llm.callbacks.wandb_logger.urllib.request.urlopen",
        "llm.config.build.hydra_instantiate", "data.worker.pickle.loads", "data.pool.pickle.loads",
        "torch.optim.optimizer.torch.load", "lightning.Trainer.fit.__globals__", "lightning.Trainer._run",
        "lightning.pytorch.callbacks.model_checkpoint.os.remove", "llm.config.signatures.locate",
    ],
)  # fmt: skip
def test_a_target_cannot_leave_the_allow_list_through_the_imports_of_a_module(target):
    (problem,) = check_node("data", {"_target_": target})
    assert "not on the allow-list" in problem or "not defined in its module" in problem


def test_no_allowed_module_starts_processes_or_reads_pickles():
    dangerous = {"subprocess", "pickle", "shutil", "hydra"}
    for path in SOURCES:
        imports = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
        }
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if imports & dangerous:
            assert not f"{name}.".startswith(ALLOWED_TARGETS), f"{name} imports {imports & dangerous}"


def test_nothing_is_ever_loaded_in_a_way_that_could_run_code():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("torch.load", "load_from_checkpoint") or called.endswith(".fit"):
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            assert keywords.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
            assert called not in ("eval", "exec", "pickle.load", "joblib.load"), f"{path}:{node.lineno}"
            if called == "yaml.load":
                assert "Safe" in ast.unparse(node), f"{path}:{node.lineno}"
            assert called != "torch.hub.load", f"{path}:{node.lineno}"
            if called == "pickle.loads":  # what data.pool sends its own worker over a pipe
                assert path.name == "worker.py", f"{path}:{node.lineno}"
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in path.read_text()


def test_a_configuration_from_a_run_folder_is_checked_against_the_allow_list_too(composed, tmp_path):
    cfg = composed("tokenizer=bytes", "trainer=cpu")
    cfg["model"]["norm"] = {"_target_": "os.system", "_partial_": True}
    save(cfg, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"model\.norm\._target_=os\.system: not on the allow-list"):
        read_config(tmp_path)


def test_every_target_of_conf_is_on_the_allow_list():
    targets = {t for path in CONF.rglob("*.yaml") for t in re.findall(r"_target_: *([\w.]+)", path.read_text())}
    assert len(targets) > 50
    for target in targets:
        problems = check_node("x", {"_target_": target, "_partial_": True})
        assert not [p for p in problems if "_target_" in p]
