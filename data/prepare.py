"""Prepare a corpus ahead of training: `python -m data.prepare data=text data.files='corpus/*.txt'`."""

from llm.commands.prepare import main

if __name__ == "__main__":
    main()
