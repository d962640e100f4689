"""Crucible: pretraining of decoder-only language models from pluggable pieces."""

__version__ = "0.1.0"
