"""Rules that carry a learning rate from one batch size to another."""
