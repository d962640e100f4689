"""Feed-forwards: what a token does alone."""
