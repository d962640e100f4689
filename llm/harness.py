"""Run lm-eval with a trained run as its model: `python -m llm.harness --model crucible …`."""

from llm.commands.harness import main

if __name__ == "__main__":
    main()
