"""Finds the folder that holds every YAML file of choices."""

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
