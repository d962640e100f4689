"""Prepares a corpus ahead of time: `python -m data.prepare data=text data.files=corpus/*.txt tokenizer=bytes`.

Takes the overrides of train.py and builds the cache that train.py looks for with the same overrides.
"""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from llm.commands.cli import run_plain_command
from llm.config.check import key_problems
from llm.config.pieces import instantiate
from llm.errors import ConfigError

PARTS = ("data", "tokenizer", "loader")
"""Groups that a cache depends on. Others may name devices that this machine lacks, and are not checked."""

log = logging.getLogger(__name__)


def prepare(cfg: Mapping[str, Any]) -> Any:
    """Build the token cache of a plain configuration of conf/train.yaml, and return the data module.

    Raises:
        ConfigError: an invalid setting.
        DataError: a corpus that cannot be used.
    """
    if problems := key_problems(cfg, groups=PARTS):
        raise ConfigError("\n".join(problems))
    source, tokenizer, loader = (instantiate(cfg[key]) for key in PARTS)
    numbers = {key: cfg[key] for key in ("context_length", "batch_tokens", "seed")}
    module = loader(source=source, tokenizer=tokenizer, micro_batch_size=1, **numbers)
    module.prepare_data()
    return module


def prepare_and_report(cfg: Mapping[str, Any]) -> None:
    """Build the token cache and print its size and contents."""
    started = time.monotonic()
    module = prepare(cfg)
    for key, value in module.report.items():
        log.info("%-14s %s", key, f"{value:_}" if isinstance(value, int) else value)
    log.info("%-14s %s", "vocab_size", f"{module.tokenizer.vocab_size:_}")
    log.info("%-14s %s", "folder", module.options.cache_dir / "tokens" / module.fingerprint)
    log.info("%-14s %.1f s", "ready after", time.monotonic() - started)


def main() -> None:
    """Run the command line of `python -m data.prepare`."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(__doc__ or "")
        return
    run_plain_command(prepare_and_report, config_name="train")
