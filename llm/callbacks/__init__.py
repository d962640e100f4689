"""Callbacks of the training loop: recording, checkpoints, signals and samples."""
