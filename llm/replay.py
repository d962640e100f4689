"""Compute the losses of one step's windows again: `python -m llm.replay run_dir=runs/<folder> step=<n>`."""

from llm.commands.replay import main

if __name__ == "__main__":
    main()
