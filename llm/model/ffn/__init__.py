"""Feed-forward layers, which act on each token alone: dense and mixtures of experts."""
