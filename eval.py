"""Judge a trained model: `python eval.py run_dir=runs/<folder>`; `--help` lists what can be asked."""

from llm.commands.cli import run_command
from llm.commands.tasks import check_evaluation, run_evaluation

if __name__ == "__main__":
    run_command(run_evaluation, config_name="eval", check=check_evaluation)
