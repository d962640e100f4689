"""Generate text with a trained run: `python -m llm.generate run_dir=runs/<folder> prompt=…`."""

from llm.commands.talk import main

if __name__ == "__main__":
    main()
