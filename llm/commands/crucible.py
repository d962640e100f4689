"""The console script `crucible`: one command with a subcommand for each entry point."""

import importlib
import sys
from difflib import get_close_matches

from llm.config.conf import entry_script

COMMANDS = {
    "train": "train a language model",
    "eval": "evaluate a trained model",
    "generate": "continue prompts with a trained model",
    "export": "write a trained model in the format of another library",
    "compress": "lower the rank of a trained model, or drop hidden units",
    "report": "compare run folders in a table and an HTML page",
    "prepare": "tokenize a corpus ahead of time",
    "replay": "compute the losses of one update's windows again",
}
"""One-line descriptions of the subcommands."""

MODULES = {"generate": "talk"}
"""Modules of `llm.commands` whose name differs from their subcommand."""


SCRIPTS = ("train", "eval")
"""Subcommands that are scripts in a checkout."""


def main() -> None:
    """Run the subcommand that the command line names; without a known one, print the list of them."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        lines = "".join(f"  {command:<10} {text}\n" for command, text in COMMANDS.items())
        usage = f"usage: crucible <command> [options]; `crucible <command> --help` lists the options\n\n{lines}"
        if name in ("-h", "--help"):
            sys.stdout.write(usage)
            return
        near = "".join(f"; did you mean {match}?" for match in get_close_matches(name, COMMANDS, n=1))
        sys.stderr.write(f"error: {name}: unknown command{near}\n{usage}")
        sys.exit(2)
    del sys.argv[1]
    if name in SCRIPTS:  # ranks and sweep jobs start this script again, without the subcommand
        sys.argv[0] = str(entry_script(name))
    if name == "train":
        _train()
    elif name == "eval":
        _evaluate()
    else:
        importlib.import_module(f"llm.commands.{MODULES.get(name, name)}").main()


def _train() -> None:
    from llm.commands.cli import run_command  # Hydra is loaded only by a command that needs it
    from llm.commands.tasks import check_training, run_training

    run_command(run_training, config_name="train", check=check_training, sweeps=True)


def _evaluate() -> None:
    from llm.commands.cli import run_command
    from llm.commands.tasks import check_evaluation, run_evaluation

    run_command(run_evaluation, config_name="eval", check=check_evaluation)
