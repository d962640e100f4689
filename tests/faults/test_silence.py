"""No setting is ignored silently, and no secret or path escapes through a command line."""

import contextlib
import signal
import sys

import pytest
import torch
import yaml
from catalogue import CONF
from fault_harness import Kill
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.config.check import check
from llm.errors import ConfigError
from llm.training.train import train


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("max_steps=0", "max_steps=0"),
        ("max_steps=-3", "max_steps=-3"),
        ("callbacks.progress=3", "callbacks.progress=3: must be a mapping with a _target_, as in conf/callbacks"),
        ("loader.cache_dir=0", "loader.cache_dir=0: must be str or Path or null; got int"),
        ("+wandb_key=hunter2", "secrets do not belong"),
        ("++logger.csv.api_key=hunter2", "secrets do not belong"),
        (
            "+callbacks.own={_target_: llm.distributed.launch.start_processes, command: [touch, owned], processes: 1}",
            "allow-list",
        ),
        ("+callbacks.own={_target_: llm.distributed.launch.subprocess.Popen, args: [touch, owned]}", "allow-list"),
        (
            "+callbacks.own={_target_: lightning.pytorch.callbacks.ModelCheckpoint, filename: ../../x}",
            "leads out of the run folder",
        ),
        ("name=..", "name=..: may have only letters"),
        ("trainer.precision=bf61", "trainer.precision=bf61"),
        ("schedule.warmup=9999", "schedule.warmup=9999"),
        ("spikes=skipp", "did you mean skip?"),
        ("optimizer.lr=abc", "optimizer.lr=abc: must be a number above 0"),
        ("optimizer.weight_decay=[1]", "optimizer.weight_decay=[1]: must be float; got list"),
    ],
)
def test_a_setting_that_cannot_be_meant_ends_with_two_and_runs_nothing(train_here, tmp_path, override, answer):
    status, said, _ = train_here(override)
    assert status == 2, said
    assert answer in said
    assert "hunter2" not in said
    assert not (tmp_path / "owned").exists()
    assert not list(tmp_path.glob("runs/*"))


TEN = {
    "optimizer=muonn": "optimizer=muonn: no such option; did you mean muon?",
    "modle.d_model=4096": "modle: unknown key; did you mean model?",
    "optimizer.lr=-1": "optimizer.lr=-1: must be above 0",
    "+optimizer.momentun=0.9": "optimizer.momentun=0.9: unknown key; did you mean momentum?",
    "model.num_heads=7": "model.num_heads=7: must divide model.d_model=4096",
    "batch_tokens=1000": "batch_tokens=1000: must be a multiple of context_length 256",
    "+trainer.devicess=2": "trainer.devicess=2: unknown key; did you mean devices?",
    "val_every=0": "val_every=0: must be at least 1 update",
    "seed=one": "seed='one': must be int; got str",
    "schedule.warmup=9999": "schedule.warmup=9999: must lie between 0 and the run's 250 steps",
}
OPENED: list[str] | None = None
"""Files opened while this is a list."""
sys.addaudithook(lambda event, given: OPENED.append(str(given[0])) if event == "open" and OPENED is not None else None)


class RealBytes(TorchDispatchMode):
    """Counts the bytes of tensors that have storage."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.device.type != "meta"]
        self.total += sum(tensor.nbytes for tensor in tensors)
        return out


def test_ten_mistakes_are_reported_together_without_data_or_model(train_here, corpus, tmp_path):
    """Hence within seconds at any size: what takes long is not begun."""
    text = ("data=text", f"data.files={corpus}/*.txt", f"loader.cache_dir={tmp_path}/cache")
    with RealBytes() as made, listening() as opened:
        status, said, _ = train_here("model=moe", "model/size=7b", *text, *TEN)
    assert status == 2
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == len(TEN), said
    assert [answer for answer in TEN.values() if f"error: {answer}" not in said] == []
    assert made.total < 10_000
    assert [path for path in opened if str(corpus) in path] == []
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def listening():
    """Yield a list that gets the names of files that are opened."""
    global OPENED
    OPENED = []
    try:
        yield OPENED
    finally:
        OPENED = None


def test_a_valid_configuration_of_any_size_is_checked_without_its_model_or_its_data(composed, corpus):
    cfg = composed("model=moe", "model/size=7b", "optimizer=muon", "data=text", f"data.files={corpus}/*.txt")
    with RealBytes() as made, listening() as opened:
        check(cfg)
    assert made.total < 1e6  # of some 80 GB
    assert [path for path in opened if str(corpus) in path] == []


def test_a_resumed_run_is_named_every_setting_that_contradicts_it_and_no_file_is_touched(train_here, tiny, tmp_path):
    folder = tmp_path / "run"
    status, said, _ = train_here(
        *tiny, "max_steps=2", "val_every=2", "callbacks.samples=null", f"hydra.run.dir={folder}"
    )
    assert status == 0, said
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}
    given = ("optimizer=lion", "model/size=small", "tokenizer=bpe", "seed=4", "context_length=64", "data=synthetic")
    status, said, _ = train_here(f"resume={folder}", *given)
    assert status == 2, said
    for answer in (
        "optimizer=llm.optim.lion.Lion: the run was made with torch.optim.AdamW",
        "model.d_model=384: the run was made with 32",
        "tokenizer=data.tokenizer.BpeTokenizer: the run was made with data.tokenizer.ByteTokenizer",
        "seed=4: the run was made with 0",
        "context_length=64: the run was made with 32",
        "data=data.synthetic.MarkovChain: the run was made with data.text_files.TextFiles",
    ):
        assert answer in said
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {p for p in before if before[p] != after[p] and ".hydra" not in p.parts} == set()
    status, said, _ = train_here(f"resume={folder}", "+wandb_key=hunter2")
    assert status == 2
    assert not [p for p in folder.rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()]
    status, said, _ = train_here(f"resume={folder}")
    assert status == 0
    assert "already complete at step 2" in said or "already complete" in (folder / "train.log").read_text()


def test_a_configuration_read_from_a_run_folder_runs_no_code(composed, tiny, tmp_path):
    cfg = composed(*tiny)
    cfg["data"] = {
        "_target_": "llm.distributed.launch.start_processes",
        "command": ["touch", str(tmp_path / "owned")],
        "processes": 1,
    }
    with pytest.raises(
        ConfigError, match=r"data\._target_=llm\.distributed\.launch\.start_processes: not on the allow-list"
    ):
        train(cfg | {"resume": str(tmp_path)}, tmp_path)
    assert not (tmp_path / "owned").exists()


def test_no_keyword_of_a_defaults_list_is_misspelt():
    """Hydra drops an entry whose keyword it does not know, and says nothing."""
    for path in sorted(CONF.rglob("*.yaml")):
        for entry in (yaml.safe_load(path.read_text()) or {}).get("defaults", []):
            for key in [entry] if isinstance(entry, str) else entry:
                *keywords, name = key.split()
                group = name.split("@")[0]
                places = (CONF / group.lstrip("/"), path.parent / group, path.parent / f"{group}.yaml")
                assert set(keywords) <= {"override", "optional"}, f"{path}: {key}"
                assert group == "_self_" or any(place.exists() for place in places), f"{path}: {key}"


@pytest.mark.slow
def test_without_a_network_wandb_costs_seconds_and_no_line(fault, steady):
    fault.environment = {
        "WANDB_API_KEY": "0" * 40,
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    outcome = fault.run("logger=wandb")
    assert outcome.status == 0, outcome.err
    assert "recording offline" in outcome.said
    assert outcome.losses == steady


@pytest.mark.slow
def test_a_killed_run_has_lost_at_most_one_line(fault):
    outcome = fault.run(kill=Kill(signal.SIGKILL, at_step=11))
    assert sorted(outcome.losses) == list(range(1, max(outcome.losses) + 1))
    assert max(outcome.losses) >= 11
