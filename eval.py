"""Judge a trained model: `python eval.py run_dir=runs/<folder>`; `--help` lists what can be asked."""

from llm.cli import run_command
from llm.evaluation import evaluate

if __name__ == "__main__":
    run_command(evaluate, config_name="eval")
