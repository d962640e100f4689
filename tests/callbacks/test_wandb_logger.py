import json
import os
import socket
import subprocess
import sys

import pytest
import yaml
from catalogue import CONF
from wandb.proto import wandb_internal_pb2
from wandb_server import StandIn

from llm.callbacks.wandb_logger import WandbRunLogger, has_key, is_reachable
from llm.config.check import check
from llm.errors import ConfigError

ROOT = CONF.parent
LOG_A_FEW = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from llm.callbacks.wandb_logger import WandbRunLogger
from llm.run_folder.folder import RunFolder
logger = WandbRunLogger(
    run_folder=RunFolder(sys.argv[1]), name="n", project="p", entity=None, mode="auto", timeout=2.0, finish_timeout=2.0,
    describe=lambda: "the plan", config={"batch_tokens": 64, "data": {"hf_token": "very-secret", "url": "http://me:very-secret@host/"}},
)
logger.log_metrics({"train/loss": 1.0, "tokens_seen": 64.0}, step=1)
logger.log_hyperparams({"other_password": "very-secret"})
logger.log_metrics({"val/loss": 0.5, "tokens_seen": 128.0}, step=2)
logger.log_rows("samples", ("step", "text"), [[2, "once upon"]], tokens_seen=128)
logger.run_folder.save_text("optimizer.txt", "the receipt")
logger.finalize("success")
"""


def run_without_terminal(folder, **environment):
    kept = {name: value for name, value in os.environ.items() if "WANDB" not in name and "NETRC" not in name}
    command = [sys.executable, "-c", LOG_A_FEW, str(folder)]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=kept | {"HOME": str(folder), "WANDB_SILENT": "true"} | environment,
    )


def unanswering_server():
    """Return a listening socket that takes connections and never says a word."""
    server = socket.create_server(("127.0.0.1", 0))
    return server, f"http://127.0.0.1:{server.getsockname()[1]}"


def test_without_a_key_a_resumed_run_records_offline_and_stores_no_secret(tmp_path):
    (tmp_path / "wandb_run_id.txt").write_text("abcd1234\n")
    result = run_without_terminal(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no key") == 1
    assert "wandb sync" in result.stderr
    recorded = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in tmp_path.rglob("*"))
    assert not any(b"very-secret" in content for content in recorded)
    assert any("abcd1234" in path.name for path in (tmp_path / "wandb").iterdir())
    assert any(b"batch_tokens" in content for content in recorded)


def read_back(folder):
    """Return the records of the one offline run in `folder`, by kind.

    The file is a LevelDB log behind seven bytes of heading: blocks of 32 KiB with records of checksum (4 bytes),
    length (2), kind (1: whole, 4: last part) and content, a protocol buffer once its parts are joined.
    """
    (path,) = folder.rglob("*.wandb")
    data, at, whole, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(whole)
            name = record.WhichOneof("record_type")
            found.setdefault(name, []).append(getattr(record, name))
            whole = b""
    return found


def test_what_an_offline_run_really_wrote_has_the_axis_the_names_the_table_the_files_and_the_sweep(tmp_path):
    sweep = {"WANDB_RUN_GROUP": "multirun-7", "WANDB_JOB_TYPE": "sweep", "WANDB_TAGS": "optimizer=muon,seed=3"}
    result = run_without_terminal(tmp_path, WANDB_SWEEP_ID="s", WANDB_RUN_ID="agent123", **sweep)
    assert result.returncode == 0, result.stderr
    records = read_back(tmp_path)
    (run,) = {(r.run_id, r.run_group, r.job_type, r.display_name, tuple(r.tags)) for r in records["run"]}
    assert run == ("agent123", "multirun-7", "sweep", "n", ("optimizer=muon", "seed=3"))  # the agent names the run
    metrics = {m.glob_name or m.name: m.step_metric for m in records["metric"]}
    assert metrics == {"tokens_seen": "", "*": "tokens_seen"}
    history = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in h.item} for h in records["history"]]
    assert [(line["tokens_seen"], line.get("train/loss"), line.get("val/loss")) for line in history] == [
        (64.0, 1.0, None), (128.0, None, 0.5), (128, None, None),
    ]  # fmt: skip
    assert history[2]["samples/_type"] == "table-file"
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text()) == {"columns": ["step", "text"], "data": [[2, "once upon"]]}
    saved = {item.path for files in records["files"] for item in files.files}
    assert {"plan.txt", "optimizer.txt"} <= saved
    assert (tmp_path / "plan.txt").read_text() == "the plan\n"


def test_a_server_receives_one_run_with_its_axis_and_a_resumed_run_continues_it(tmp_path):
    with StandIn() as server:
        reach = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": server.url, "WANDB_RUN_GROUP": "multirun-7"}
        for attempt in (1, 2):
            result = run_without_terminal(tmp_path, **reach, WANDB_JOB_TYPE="sweep", WANDB_TAGS="seed=3")
            assert result.returncode == 0, result.stderr
            assert server.exit_codes == {(tmp_path / "wandb_run_id.txt").read_text().strip(): [0] * attempt}
        ((run_id, run),) = server.runs.items()
    assert (run["groupName"], run["jobType"], run["tags"], run["displayName"]) == (
        "multirun-7",
        "sweep",
        ["seed=3"],
        "n",
    )
    config = json.loads(run["config"])
    assert config["batch_tokens"] == {"value": 64}
    assert "very-secret" not in run["config"]
    # defined metrics travel as protocol buffers' field numbers: name 1, pattern 2, axis 5 as a place in this list
    told = [(m.get("1") or m.get("2"), m.get("5")) for m in config["_wandb"]["value"]["m"]]
    assert told == [("tokens_seen", None), ("*", 1)]
    rows = [(r["_step"], r["tokens_seen"], r.get("train/loss"), r.get("val/loss")) for r in server.history(run_id)]
    once = [(64, 1, None), (128, None, 0.5), (128, None, None)]
    assert rows == [(step, *row) for step, row in enumerate([*once, *once])]  # the second continues after the first
    assert server.files[run_id, "plan.txt"] == b"the plan\n"
    assert server.files[run_id, "optimizer.txt"] == b"the receipt"
    assert server.artifacts == [f"run-{run_id}-samples"] * 2
    (table, *_) = (content for (_, name), content in server.files.items() if name.startswith("media/table"))
    assert json.loads(table)["data"] == [[2, "once upon"]]


LOSE = """
import sys, psutil
from llm.callbacks.wandb_logger import WandbRunLogger
from llm.run_folder.folder import RunFolder
import logging, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
logger = WandbRunLogger(run_folder=RunFolder(sys.argv[1]), name="n", project="p", entity=None, mode="auto", timeout=5.0,
                        finish_timeout=5.0, describe=str, config={})
logger.log_metrics({"train/loss": 1.0, "tokens_seen": 64.0}, step=1)
if sys.argv[2] == "core":
    for process in psutil.Process().children(recursive=True):
        if "wandb-core" in process.name():
            process.kill()
else:
    print("begun", flush=True)
    time.sleep(3)
for step in range(2, 5):
    began = time.monotonic()
    logger.log_metrics({"train/loss": 1.0, "tokens_seen": 64.0 * step}, step=step)
    logger.log_rows("samples", ("text",), [["once upon"]], tokens_seen=64 * step)
    print("seconds", time.monotonic() - began)
logger.finalize("success")
print("trained to the end")
"""


def losing(tmp_path, what, server):
    kept = {name: value for name, value in os.environ.items() if "WANDB" not in name and "NETRC" not in name}
    reach = {"HOME": str(tmp_path), "WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": server.url, "WANDB_SILENT": "true"}
    return subprocess.Popen([sys.executable, "-c", LOSE, str(tmp_path), what], stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=kept | reach)  # fmt: skip


def test_training_continues_when_the_process_of_wandb_dies(tmp_path):
    with StandIn() as server:
        out, err = losing(tmp_path, "core", server).communicate(timeout=120)
    assert "trained to the end" in out, err
    assert err.count("W&B failed") == 1


@pytest.mark.slow
def test_training_continues_without_network_and_waits_for_one_table_alone(tmp_path):
    with StandIn() as server:
        process = losing(tmp_path, "network", server)
        assert process.stdout.readline() == "begun\n"
        server.is_silent = True
        out, err = process.communicate(timeout=200)
    assert "trained to the end" in out, err
    assert err.count("W&B failed") == 1
    waits = [float(line.split()[1]) for line in out.splitlines() if line.startswith("seconds")]
    assert waits[0] < 60
    assert max(waits[1:]) < 1


def test_the_sweep_for_wandbs_own_agent_gives_command_lines_that_compose(composed):
    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    values = {k: v["values"][0] if "values" in v else v["min"] for k, v in sweep["parameters"].items()}
    whole = {"${env}": [], "${interpreter}": [], "${args_no_hyphens}": [f"{k}={v}" for k, v in values.items()]}
    arguments = [part for word in sweep["command"] for part in whole.get(word, [word]) if word != "${program}"]
    assert "logger=wandb" in arguments
    check(composed(*arguments))
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["metric"] == {"name": "val/loss", "goal": "minimize"}


def test_with_a_key_and_a_silent_network_it_is_offline_after_the_timeout(tmp_path):
    server, host = unanswering_server()
    with server:
        result = run_without_terminal(tmp_path, WANDB_API_KEY="k" * 40, WANDB_BASE_URL=host)
    assert result.returncode == 0, result.stderr
    assert "did not answer in 2 s" in result.stderr
    assert len((tmp_path / "wandb_run_id.txt").read_text().strip()) == 8
    assert ("k" * 40).encode() not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def make(folder, **options):
    given = {"mode": "online", "timeout": 0.5, "finish_timeout": 1.0} | options
    supplied = {"run_folder": folder, "name": "n", "config": {}, "describe": str}
    return WandbRunLogger(**supplied, project="p", entity=None, **given)


def test_mode_online_without_a_key_or_a_network_is_an_error(folder, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"logger\.wandb\.mode=online: no key"):
        make(folder).experiment  # noqa: B018
    server, host = unanswering_server()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", host)
    with server, pytest.raises(ConfigError, match=r"127\.0\.0\.1 did not answer"):
        make(folder).experiment  # noqa: B018


@pytest.mark.parametrize("option", [{"mode": "onlin"}, {"timeout": 0}, {"finish_timeout": -1.0}])
def test_settings_out_of_range_are_refused(folder, option):
    with pytest.raises((ConfigError, TypeError), match=next(iter(option))):
        make(folder, **option)


def test_a_key_in_netrc_counts_for_its_host_only(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert has_key("https://api.wandb.ai")
    assert not has_key("https://elsewhere.example")


@pytest.mark.timeout(60)  # without limits of its own, the question to a silent server never ends
def test_a_name_that_does_not_exist_and_a_silent_server_are_unreachable():
    server, host = unanswering_server()
    with server:
        assert not is_reachable(host, timeout=0.5)
    assert not is_reachable("https://nowhere.invalid", timeout=0.5)
