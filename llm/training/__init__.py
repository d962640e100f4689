"""Trains a model: from a checked configuration to a finished run folder."""
