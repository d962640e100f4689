import time
from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset

from llm.callbacks.checkpoint_io import FolderCheckpointIO
from llm.callbacks.checkpoints import Checkpoints
from llm.callbacks.final_validation import FinalValidation
from llm.callbacks.recorder import Recorder
from llm.callbacks.rng_state import RngState
from llm.callbacks.stop_signals import StopSignals
from llm.callbacks.summary import Summary
from llm.callbacks.throughput import Throughput
from llm.run_folder.folder import RunFolder


class Rows(Dataset):
    """Row n is a pure function of n, so that a resumed run sees what an uninterrupted one would."""

    def __init__(self, start: int, length: int) -> None:
        self.start, self.length = start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.start + index)
        return torch.randn(8, generator=generator)


class TinyData(L.LightningDataModule):
    """Starts at the row from which the run continues."""

    def __init__(self, rows_a_step: int, workers: int = 0) -> None:
        super().__init__()
        self.rows_a_step, self.workers = rows_a_step, workers

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.global_step * self.rows_a_step
        return DataLoader(Rows(start, 100_000), batch_size=2, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Rows(10**6, 4), batch_size=2)


class TinyModule(L.LightningModule):
    """A stand-in for the language module: dropout, a tied weight, and the attributes that callbacks read."""

    def __init__(self, *, seconds_a_step: float = 0.0, val_losses: Iterable[float] = ()) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.inner.weight
        self.dropout = nn.Dropout(0.3)
        self.batch_tokens, self.flops_per_token = 32, 1000
        self.seconds_a_step = seconds_a_step
        self.step_metrics: dict[str, Any] = {}
        self.val_losses = iter(val_losses)
        self.losses: list[torch.Tensor] = []
        self.sampled: list[int] = []

    def batch_tokens_at(self, step: int) -> int:
        return self.batch_tokens

    def tokens_seen(self, step: int) -> int:
        return step * self.batch_tokens

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.tied(self.dropout(self.inner(batch))) - batch).square().mean()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.seconds_a_step:
            time.sleep(self.seconds_a_step)
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        rate = float(optimizer.param_groups[0]["lr"])
        self.step_metrics = {"train/loss": torch.stack(self.losses).mean(), "lr/matrix": rate}
        self.losses.clear()

    def on_validation_epoch_start(self) -> None:
        self.val_loss = next(self.val_losses, None)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("val/loss", loss if self.val_loss is None else torch.tensor(self.val_loss))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def generate_text(self, prompts: list[str], **options: Any) -> list[str]:
        self.sampled.append(self.global_step)
        return [f"{prompt}{torch.rand(()):.3f}" for prompt in prompts]


def make_trainer(
    folder: RunFolder,
    *,
    max_steps: int,
    val_every: int = 4,
    checkpoint_every: int = 5,
    accumulation: int = 2,
    log_every: int = 1,
    extra: list[Callback] | None = None,
    **options: Any,
) -> L.Trainer:
    callbacks: list[Callback] = [
        Summary(run_folder=folder),
        Throughput(peak_flops=1e9, window=20),
        Recorder(run_folder=folder, log_every=log_every),
        *(extra or []),
        RngState(),
        FinalValidation(),
        StopSignals(),
        Checkpoints(run_folder=folder, checkpoint_every=checkpoint_every, keep=2),
    ]
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": max_steps,
            "accumulate_grad_batches": accumulation,
            "val_check_interval": val_every * accumulation,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "default_root_dir": folder.path,
            "callbacks": callbacks,
            "plugins": [FolderCheckpointIO(manifest={"world_size": 1})],
            **options,
        }
    )


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    return folder


@pytest.fixture
def tiny_module():
    return TinyModule


@pytest.fixture
def train():
    """Train the stand-in for `max_steps` updates in a run folder, from its last checkpoint where it has one."""

    def run(folder: RunFolder, *, workers: int = 0, seed: int = 0, module: Any = None, **options: Any) -> L.Trainer:
        L.seed_everything(seed, verbose=False)
        module = module or TinyModule()
        ckpt_path = options.pop("ckpt_path", None)
        trainer = make_trainer(folder, **options)
        trainer.fit(
            module,
            datamodule=TinyData(2 * options.get("accumulation", 2), workers),
            ckpt_path=ckpt_path,
            weights_only=True,
        )
        return trainer

    return run
