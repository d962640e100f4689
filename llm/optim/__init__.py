"""Optimizers, parameter groups, and the receipt that lists the update rule of each tensor."""
