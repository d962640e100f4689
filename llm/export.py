"""Export a trained model: `python -m llm.export run_dir=runs/<folder> format=hf out=<new folder>`."""

from llm.commands.export import main

if __name__ == "__main__":
    main()
