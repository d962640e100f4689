"""Judge a trained model: `python eval.py run_dir=runs/<folder>`; `--help` lists what can be asked."""

from llm.commands.cli import run_command
from llm.commands.evaluate import check_eval, evaluate

if __name__ == "__main__":
    run_command(evaluate, config_name="eval", check=check_eval)
