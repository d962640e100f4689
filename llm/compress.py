"""Compress a trained model: `python -m llm.compress run_dir=runs/<folder> method=svd share=0.5 out=<new folder>`."""

from llm.commands.compress import main

if __name__ == "__main__":
    main()
