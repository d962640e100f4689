"""Finds the configuration folder and the scripts, in a checkout and in an installed wheel."""

from pathlib import Path

from llm.errors import ConfigError


def conf_folder() -> Path:
    """Return the `conf/` folder: beside the packages in a checkout, inside `llm` in an installed wheel.

    Raises:
        ConfigError: neither exists, because the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"conf={package / 'conf'}: missing from this installation; reinstall with `pip install .`")


def entry_script(name: str) -> Path:
    """Return train.py or eval.py: beside `conf/` in a checkout, in `llm/entry/` in an installed wheel."""
    root = conf_folder().parent
    script = root / f"{name}.py"
    return script if script.is_file() else root / "entry" / f"{name}.py"
