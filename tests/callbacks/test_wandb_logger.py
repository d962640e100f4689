import os
import socket
import subprocess
import sys
import time

import pytest

from llm.callbacks.wandb_logger import WandbRunLogger, has_key, is_reachable
from llm.errors import ConfigError

LOG_A_FEW = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
from llm.callbacks.wandb_logger import WandbRunLogger
from llm.run_folder import RunFolder
logger = WandbRunLogger(
    run_folder=RunFolder(sys.argv[1]), name="n", project="p", entity=None, mode="auto", timeout=2.0, finish_timeout=2.0,
    config={"batch_tokens": 64, "data": {"hf_token": "very-secret", "url": "http://me:very-secret@host/"}},
)
began = time.monotonic()
logger.log_metrics({"train/loss": 1.0}, step=1)
logger.log_hyperparams({"other_password": "very-secret"})
print("began in", time.monotonic() - began)
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


def test_without_a_key_it_goes_on_offline_in_the_run_its_folder_names_and_keeps_no_secret(tmp_path):
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


def test_with_a_key_and_a_silent_network_it_is_offline_within_ten_seconds(tmp_path):
    server, host = unanswering_server()
    with server:
        result = run_without_terminal(tmp_path, WANDB_API_KEY="k" * 40, WANDB_BASE_URL=host)
    assert result.returncode == 0, result.stderr
    assert "did not answer in 2 s" in result.stderr
    assert float(result.stdout.split("began in")[1].split()[0]) < 10
    assert len((tmp_path / "wandb_run_id.txt").read_text().strip()) == 8
    assert ("k" * 40).encode() not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def make(folder, **options):
    given = {"mode": "online", "timeout": 0.5, "finish_timeout": 1.0} | options
    return WandbRunLogger(run_folder=folder, name="n", config={}, project="p", entity=None, **given)


def test_mode_online_without_a_key_or_a_network_is_an_error(folder, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"logger\.mode=online: no key"):
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


def test_a_name_that_does_not_exist_and_a_silent_server_are_unreachable_in_time():
    server, host = unanswering_server()
    began = time.monotonic()
    with server:
        assert not is_reachable(host, timeout=0.5)
    assert not is_reachable("https://nowhere.invalid", timeout=0.5)
    assert time.monotonic() - began < 5  # two half seconds, and a slow machine
