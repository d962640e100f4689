"""Run lm-eval with a trained run as its model: `python -m llm.harness --model crucible …`."""

from llm.commands.lm_eval_cli import main

if __name__ == "__main__":
    main()
