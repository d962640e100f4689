"""Lists the options of conf/, over which the contract tests run."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parent.parent / "conf"


def options(group: str) -> list[str]:
    """Return every option of a configuration group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def build_piece(group: str, name: str, **arguments: Any) -> Any:
    """Build one option, and call its factory with `arguments`."""
    return instantiate(OmegaConf.load(CONF / group / f"{name}.yaml"), _convert_="all")(**arguments)
