"""Train a language model: `python train.py optimizer=adamw model=dense`; `--help` lists what can be chosen."""

from llm.commands.cli import run_command
from llm.commands.tasks import check_training, run_training

if __name__ == "__main__":
    run_command(run_training, config_name="train", check=check_training, sweeps=True)
