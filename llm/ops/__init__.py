"""Arithmetic that knows no model: elementwise functions, matrix products, losses, precision, FLOPs and memory."""
