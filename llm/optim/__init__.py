"""Optimizers, their parameter groups and the receipt."""
