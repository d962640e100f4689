"""What happens beside the training step: recording, checkpoints, signals, samples."""
