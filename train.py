"""Train a language model: `python train.py optimizer=adamw model=dense`; `--help` lists what can be chosen."""

from llm.commands.cli import run_command
from llm.config.check import check
from llm.training.train import train

if __name__ == "__main__":
    run_command(train, config_name="train", check=check, sweeps=True)
