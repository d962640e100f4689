"""Reads and writes the state of ZeRO's engine under the names of parameters, without importing DeepSpeed."""
