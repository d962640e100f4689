"""Prepares a corpus ahead of time: `python -m data.prepare data=text data.files=corpus/*.txt tokenizer=bytes`.

Takes the overrides of train.py and builds the very cache that train.py will look for with them.
"""

import logging
import sys
import time
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm.config.conf import conf_folder
from llm.errors import ConfigError, CrucibleError

CONFIG_DIR = conf_folder()
_OWN_PACKAGE = "data."
_EXIT_MISTAKE = 2
_log = logging.getLogger(__name__)


def prepare(overrides: list[str]) -> Any:
    """Compose conf/train.yaml with the overrides, build the token cache, and return the data module.

    Raises:
        ConfigError: a setting that cannot be honoured.
        DataError: a corpus that cannot be used.
    """
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = compose("train", overrides=overrides)
        source, tokenizer, loader = (_build(cfg, key) for key in ("data", "tokenizer", "loader"))
        numbers = {key: cfg[key] for key in ("context_length", "batch_tokens", "seed")}
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, CrucibleError) else ConfigError(str(error))) from error
    module = loader(source=source, tokenizer=tokenizer, micro_batch_size=1, **numbers)
    module.prepare_data()
    return module


def _build(cfg: Any, key: str) -> Any:
    node = OmegaConf.to_container(cfg[key], resolve=True, throw_on_missing=True)
    assert isinstance(node, dict)
    target = str(node.get("_target_"))
    if not target.startswith(_OWN_PACKAGE):  # configuration is data, not code
        raise ConfigError(f"{key}._target_={target}: not a piece of {_OWN_PACKAGE}*; choose one with {key}=<name>")
    return instantiate(node, _convert_="all")


def main() -> None:
    """Prepare the corpus that the command line describes and say what it holds."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            _log.info("%s", __doc__)
            return
        module = prepare(sys.argv[1:])
    except CrucibleError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(_EXIT_MISTAKE)
    for key, value in module.report.items():
        _log.info("%-14s %s", key, f"{value:_}" if isinstance(value, int) else value)
    _log.info("%-14s %s", "vocab_size", f"{module.tokenizer.vocab_size:_}")
    _log.info("%-14s %s", "folder", module.options.cache_dir / "tokens" / module.fingerprint)
    _log.info("%-14s %.1f s", "ready after", time.monotonic() - started)
