"""Updates summary.json: the state of a run, and its final figures."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llm.contracts import FinalReporter, StopRequest
from llm.distributed.parameters import count_parameters
from llm.ops.memory import peak_memory_bytes
from llm.run_folder.folder import RunFolder
from llm.run_folder.provenance import git_commit, versions

_FINAL = {
    "val/loss": "val/loss",
    "val/loss_standard_error": "loss_standard_error",
    "val/bits_per_byte": "bits_per_byte",
    "val/perplexity": "perplexity",
}


class Summary(Callback):
    """A callback that updates summary.json: running, finished, `stopped: SIGTERM`, or `failed: why`.

    Figures come from the module, the trainer, and each callback that is a `FinalReporter`.

    Args:
        run_folder: the folder of summary.json.
    """

    def __init__(self, *, run_folder: RunFolder) -> None:
        self.run_folder = run_folder
        self._began = time.monotonic()
        self._seconds_before = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record that the run is running, with its parameters and versions."""
        self._began = time.monotonic()
        total, active = count_parameters(pl_module)
        figures = {"status": "running", "parameters": total, "active_parameters": active}
        figures["flops_per_token"] = pl_module.flops_per_token
        self.run_folder.update(figures | {"git_commit": git_commit(), "versions": versions()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record the results of validation, so that they survive a kill."""
        if not trainer.sanity_checking:
            self.run_folder.update(self._figures(trainer, pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record the final figures while the optimizer still exists."""
        self.run_folder.update(self._figures(trainer, pl_module) | _closing_figures(trainer, pl_module))

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record how the run ended."""
        signal = _stop_signal(trainer)
        self.run_folder.update({"status": "finished" if signal is None else f"stopped: {signal.name}"})

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Record why the run failed."""
        if isinstance(exception, KeyboardInterrupt):
            signal = _stop_signal(trainer)
            status = f"stopped: {'SIGINT' if signal is None else signal.name} (at once)"
        else:
            status = f"failed: {next(iter(str(exception).splitlines()), '') or type(exception).__name__}"
        self.run_folder.update(self._figures(trainer, pl_module) | {"status": status})

    def state_dict(self) -> dict[str, float]:
        """Return the seconds so far, so that the total spans resumed runs."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the seconds of a checkpoint."""
        self._seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _figures(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        step = trainer.global_step
        figures = {"steps": step, "tokens_seen": pl_module.tokens_seen(step), "seconds": self._seconds()}
        metrics = trainer.callback_metrics
        return figures | {key: float(metrics[name]) for name, key in _FINAL.items() if name in metrics}


def _closing_figures(trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
    figures = {
        "optimizer_state_bytes": sum(_state_bytes(optimizer.state) for optimizer in trainer.optimizers),
        "peak_memory_bytes": peak_memory_bytes(pl_module.device),
    }
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, FinalReporter):
            figures.update(callback.final_figures(trainer, pl_module))
    return figures


def _state_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(_state_bytes(inner) for inner in state.values())
    return 0


def _stop_signal(trainer: L.Trainer) -> Any:
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((c.signal for c in callbacks if isinstance(c, StopRequest) and c.signal is not None), None)
