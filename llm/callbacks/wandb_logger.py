"""Logs to Weights & Biases without stopping or delaying a run; without a key or a network it records offline."""

import logging
import netrc
import os
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

from llm.config.safety import redact
from llm.errors import ConfigError
from llm.run_folder.folder import RunFolder

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
AXIS = "tokens_seen"
"""The metric of the horizontal axis."""
FILES = ("plan.txt", "optimizer.txt", "samples.txt", "curves.png", "expert_load.png")
"""Files of a run folder that are uploaded at the end, where they exist."""
_ID_FILE = "wandb_run_id.txt"
TABLES_AGAIN_AFTER = 600.0
"""Seconds without tables after one could not be sent, because W&B waits for its server's answer for each table."""


class WandbRunLogger(WandbLogger):
    """A logger for W&B. A resumed run continues the W&B run that its folder names, and secrets are never sent.

    The key comes from `wandb login` or WANDB_API_KEY, never from a configuration. Metrics are drawn against tokens_seen
    under the names of metrics.jsonl; samples and expert load are tables; the plan and the optimizer's receipt are
    files. The jobs of a sweep share a group, and have the swept values as tags. If the network or W&B's own process
    fails during the run, training continues with one warning.

    Args:
        run_folder: the folder that stores the run's id and `wandb/`.
        name: displayed name of the run.
        config: the resolved configuration; values that look like secrets are redacted.
        describe: returns the text of the run's plan.
        project: W&B project.
        entity: user or team; None for the user of the key.
        mode: `auto` is online with a key and a network, else offline with one warning; `online` raises without them.
            The environment variable WANDB_MODE takes precedence over `auto`.
        timeout: seconds, above 0, to wait for the server at the start.
        finish_timeout: seconds, above 0, to wait for uploads at the end; the rest can be uploaded later.
    """

    def __init__(
        self,
        *,
        run_folder: RunFolder,
        name: str,
        config: Mapping[str, Any],
        describe: Callable[[], str],
        project: str,
        entity: str | None,
        mode: Literal["auto", "online", "offline", "disabled"],
        timeout: float,
        finish_timeout: float,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"logger.wandb.mode={mode}: not one of {', '.join(MODES)}; try auto")
        for key, seconds in (("timeout", timeout), ("finish_timeout", finish_timeout)):
            if seconds <= 0:
                raise ConfigError(f"logger.wandb.{key}={seconds}: must be above 0 seconds; try 5")
        self.run_folder, self.mode, self.timeout, self.finish_timeout = run_folder, mode, timeout, finish_timeout
        self.describe = describe
        self._has_failed, self._tables_from = False, 0.0
        try:
            super().__init__(name=name, save_dir=run_folder.path, project=project, entity=entity, config=redact(config))
        except ModuleNotFoundError as error:
            raise ConfigError("logger=wandb: wandb is not installed; pip install wandb, or logger=csv") from error

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, which starts at the first use, on the first rank only."""
        if self._experiment is None:
            self._experiment = self._begin()
            self._experiment.define_metric(AXIS)
            self._experiment.define_metric("*", step_metric=AXIS, step_sync=True)
            self.run_folder.save_text("plan.txt", self.describe() + "\n")
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name."""
        _ = self.experiment  # an error at the start is an error
        self._try(lambda: super(WandbRunLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_rows(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, tokens_seen: int) -> None:
        """Show rows as a table."""
        import wandb

        run, now = self.experiment, time.monotonic()
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        if now >= self._tables_from and not self._try(lambda: run.log({name: table, AXIS: tokens_seen})):
            self._tables_from = now + TABLES_AGAIN_AFTER

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add to the run's configuration, redacted."""
        _ = self.experiment
        told = redact(params if isinstance(params, dict) else vars(params))
        self._try(lambda: super(WandbRunLogger, self).log_hyperparams(told))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run and wait up to `finish_timeout` for uploads; log how to upload the rest."""
        if self._experiment is None:
            return
        run, self._experiment = self._experiment, None
        offline = getattr(run, "offline", False)
        folder = Path(run.dir).parent if offline else None
        self._try(lambda: self._finish(run, exit_code=0 if status == "success" else 1))
        if folder is not None:
            log.info("W&B recorded offline; upload with: wandb sync %s", folder)

    def _finish(self, run: Any, *, exit_code: int) -> None:
        for name in FILES:
            if (self.run_folder.path / name).is_file():
                run.save(str(self.run_folder.path / name), base_path=str(self.run_folder.path), policy="now")
        run.finish(exit_code=exit_code)

    def _try(self, send: Callable[[], Any]) -> bool:
        """Call a function that may fail without a network or after W&B's process ended; return whether it succeeded."""
        try:
            send()
        except Exception as error:  # errors of any kind, because none may end a training run
            if not self._has_failed:
                why = next(iter(str(error).splitlines()), "") or type(error).__name__
                log.warning("W&B failed (%s): training continues, and metrics.jsonl has all metrics", why)
            self._has_failed = True
            return False
        return True

    def _begin(self) -> Any:
        import wandb

        if wandb.run is not None:  # left by an earlier job of the same process
            wandb.finish()
        mode = self._resolved_mode()
        try:
            return self._init(mode)
        except (wandb.Error, OSError, TimeoutError) as error:
            if mode != "online" or self.mode == "online":
                raise ConfigError(
                    f"logger.wandb.mode={mode}: W&B did not start ({error}); try logger.wandb.mode=offline"
                ) from error
            log.warning("W&B did not start (%s): recording offline", next(iter(str(error).splitlines()), ""))
            return self._init("offline")

    def _init(self, mode: str) -> Any:
        import wandb

        id_path = self.run_folder.path / _ID_FILE
        given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None  # by W&B's own agent
        run_id = id_path.read_text().strip() if id_path.exists() else given or uuid.uuid4().hex[:8]
        self.run_folder.save_text(_ID_FILE, run_id + "\n")
        wanted = {"init_timeout": self.timeout, "finish_timeout": self.finish_timeout, "console": "off"}
        known = getattr(wandb.Settings, "model_fields", wanted)
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
        resume = "allow" if mode == "online" else None  # an offline run cannot reach the server, and would warn
        return wandb.init(**self._wandb_init | {"id": run_id, "mode": mode, "resume": resume, "settings": settings})

    def _resolved_mode(self) -> str:
        """Return online or offline without prompting the user."""
        asked = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if asked not in ("auto", "online"):
            return "offline" if asked == "dryrun" else asked
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        trouble = ""
        if not has_key(host):
            trouble = "no key (run `wandb login`, or set WANDB_API_KEY)"
        elif not is_reachable(host, timeout=self.timeout):
            trouble = f"{urlsplit(host).hostname} did not answer in {self.timeout:g} s"
        if trouble and self.mode == "online":
            raise ConfigError(
                f"logger.wandb.mode=online: {trouble}; or record now and upload later with logger.wandb.mode=offline"
            )
        if trouble:
            log.warning("W&B: %s; recording offline, `wandb sync` uploads it later", trouble)
        return "offline" if trouble else "online"


def has_key(host: str) -> bool:
    """Return whether W&B finds a key without prompting: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            return netrc.netrc(path).authenticators(urlsplit(host).hostname or "") is not None
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def is_reachable(host: str, *, timeout: float) -> bool:
    """Return whether a server answers within `timeout` seconds, through a proxy where one is set."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(host, timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer
        except (OSError, ValueError):
            return
        answered.set()

    # a name lookup has no timeout, so a thread does it
    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(timeout)
    return answered.is_set()
