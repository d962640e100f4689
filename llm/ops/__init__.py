"""Arithmetic without a model: elementwise functions, matrix products, losses, precision, FLOPs and memory."""
