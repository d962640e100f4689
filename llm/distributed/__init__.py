"""Starts several processes, lets them agree on values, and runs DeepSpeed's ZeRO."""
