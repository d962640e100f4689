"""Places Lightning's file loggers inside the run folder."""

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from llm.errors import ConfigError
from llm.run_folder.folder import RunFolder


class RunCsvLogger(CSVLogger):
    """Lightning's CSV logger, which continues on a full disk."""

    def __init__(self, *, run_folder: RunFolder, flush_every: int) -> None:
        super().__init__(save_dir=run_folder.path, name="csv", flush_logs_every_n_steps=flush_every)
        self.run_folder = run_folder

    def save(self) -> None:
        """Write the file, unless the disk is full."""
        with self.run_folder.unless_full("csv"):
            super().save()


def csv_logger(*, run_folder: RunFolder, flush_every: int) -> CSVLogger:
    """Write `csv/version_N/metrics.csv`; a resumed run opens the next N, because Lightning starts a file anew.

    Args:
        run_folder: the folder in which `csv/` is created. Its metrics.jsonl includes the steps of all resumed runs.
        flush_every: records between writes, at least 1.
    """
    if flush_every < 1:
        raise ConfigError(f"logger.csv.flush_every={flush_every}: must be at least 1; try 20")
    return RunCsvLogger(run_folder=run_folder, flush_every=flush_every)


def tensorboard_logger(*, run_folder: RunFolder) -> TensorBoardLogger:
    """Write `tensorboard/`; view it with `tensorboard --logdir <run folder>`.

    A resumed run hides the steps that an earlier process logged after the checkpoint, because it logs them again.

    Args:
        run_folder: the folder in which `tensorboard/` is created. Its metrics.jsonl ends at the step from which the run
            continues.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    lines = run_folder.read_metrics()
    try:
        return TensorBoardLogger(
            save_dir=run_folder.path,
            name="tensorboard",
            version="",
            default_hp_metric=False,
            purge_step=lines[-1]["step"] + 1 if lines else 0,
        )
    except ModuleNotFoundError as error:
        raise ConfigError("logger=tensorboard: tensorboard is not installed; pip install tensorboard") from error
