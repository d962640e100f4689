"""The folder of a run: its files, metrics and checkpoints."""
