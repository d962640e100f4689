import pickle

import lightning as L
import pytest
import torch

from data.data_module import TokenDataModule
from llm.errors import ConfigError, DataError


class Recorder(L.LightningModule):
    """Trains nothing of use and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []
        self.validated: list[list[list[int]]] = []

    def training_step(self, batch, _):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * 0

    def validation_step(self, batch, _):
        self.validated.append(batch["input_ids"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, *, max_steps, ckpt_path=None, **changes):
    recorder = Recorder()
    trainer = L.Trainer(
        max_steps=max_steps,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=folder,
        **changes,
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return recorder


@pytest.fixture
def module(make_module, make_text, write_lines, texts) -> TokenDataModule:
    return make_module(make_text(write_lines(texts)))


def test_sizes_and_fingerprint_are_known_before_a_trainer_exists(module, texts):
    module.prepare_data()
    module.setup("fit")
    total = sum(len(text.encode()) + 1 for text in texts)
    assert module.train_tokens + module.val_tokens == total
    assert module.num_windows == (module.train_tokens - 1) // 16
    assert module.tokenizer.vocab_size == 257
    assert module.windows_per_step == 4
    assert len(module.fingerprint) == 32


def test_consecutive_windows_have_every_token_as_a_label_once(module):
    module.prepare_data()
    windows = module.windows("train")
    labels = torch.cat([windows[i]["labels"].flatten() for i in range(len(windows))])
    assert labels.tolist() == module.cache.train.read(1, 1 + len(labels)).tolist()
    assert module.train_tokens - 1 - len(labels) < 16


def test_a_trainer_sees_the_windows_of_the_run_in_order(module, tmp_path):
    recorder = fit(module, tmp_path, max_steps=3)
    sampler = module.train_sampler(total_steps=3)
    windows = module.windows("train")
    assert recorder.seen == [windows.__getitems__(batch)["input_ids"].tolist() for batch in sampler]
    assert len(recorder.seen) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_reads_the_windows_of_an_uninterrupted_one(module, tmp_path, num_workers):
    """Past the end of an epoch, with accumulation, resumed twice, with and without worker processes."""
    module.prepare_data()
    steps = module.num_windows // 4 + 5
    whole = fit(module, tmp_path, max_steps=steps).seen
    module.num_workers = num_workers
    parts = fit(module, tmp_path, max_steps=3).seen
    for stop in (steps - 3, steps):
        parts += fit(module, tmp_path, max_steps=stop, ckpt_path=tmp_path / "last.ckpt").seen
    assert parts == whole


def test_validation_sees_the_same_windows_with_any_micro_batch_size(module):
    module.prepare_data()
    rows = []
    for size in (1, 3, 8):
        module.micro_batch_size = size
        rows.append([row for batch in module.val_dataloader() for row in batch["input_ids"].tolist()])
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == len(module.windows("val")) // 8 * 8


def test_val_tokens_limits_a_validation(make_module, make_text, write_lines, texts):
    module = make_module(make_text(write_lines(texts)), val_tokens=16 * 8)
    module.prepare_data()
    assert sum(len(batch["input_ids"]) for batch in module.val_dataloader()) == 8


def test_accumulation_that_contradicts_the_batch_is_refused(module, tmp_path):
    module.batch_tokens = 16 * 12
    with pytest.raises(
        ConfigError, match=r"trainer\.accumulate_grad_batches=2: batch_tokens=192 needs 6 micro-batches"
    ):
        fit(module, tmp_path, max_steps=1)


def test_batch_tokens_that_hold_no_whole_windows_are_refused(module):
    module.prepare_data()
    module.batch_tokens = 100
    with pytest.raises(ConfigError, match="batch_tokens=100: must be a multiple of context_length=16; try 96"):
        module.train_sampler(total_steps=1)


def test_a_run_without_a_number_of_steps_is_refused(module, tmp_path):
    with pytest.raises(ConfigError, match="max_steps=-1"):
        fit(module, tmp_path, max_steps=-1, max_epochs=1)


def test_a_corpus_shorter_than_a_window_is_refused(make_module, make_text, tmp_path):
    (tmp_path / "a.txt").write_text("short")
    module = make_module(make_text(tmp_path / "a.txt"), val_fraction=1e-9)
    with pytest.raises(
        DataError, match=r"context_length=16: one window needs 17 tokens, the training split has 6 \(1 doc"
    ):
        module.prepare_data()


def test_an_empty_validation_split_is_refused(make_module, make_text, tmp_path):
    (tmp_path / "a.txt").write_text("long enough " * 50)
    module = make_module(make_text(tmp_path / "a.txt"), val_fraction=1e-9)
    with pytest.raises(DataError, match=r"the validation split has 0 tokens.*data\.document_bytes=auto"):
        module.prepare_data()


def test_a_corpus_that_is_discarded_whole_names_the_largest_cause(make_module, make_text, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 99)
    with pytest.raises(DataError, match=r"0 documents; discarded: .* 1 invalid_utf8, .*convert the files to UTF-8"):
        make_module(make_text(tmp_path / "a.txt")).prepare_data()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("val_tokens", 15),
        ("num_workers", -1),
        ("max_line_bytes", 0),
        ("num_processes", 0),
        ("context_length", 0),
    ],
)
def test_settings_out_of_range_are_named(make_module, make_text, setting, value):
    with pytest.raises(ConfigError, match=f"{setting}={value}: must be"):
        make_module(make_text("unused"), **{setting: value})


def test_a_dataset_that_is_sent_to_a_worker_contains_no_tokens(module):
    module.prepare_data()
    windows = module.windows("train")
    windows[0]
    assert len(pickle.dumps(windows)) < 2000
