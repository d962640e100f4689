"""Compare runs: `python -m llm.report runs/<folder> …`."""

from llm.commands.report import main

if __name__ == "__main__":
    main()
