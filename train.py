"""Train a language model: `python train.py optimizer=adamw model=dense`; `--help` lists what can be chosen."""

from llm.checking import check
from llm.cli import run_command
from llm.training import train

if __name__ == "__main__":
    run_command(train, config_name="train", check=check, sweeps=True)
