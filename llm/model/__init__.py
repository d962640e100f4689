"""The decoder and the pieces that it is composed of."""
