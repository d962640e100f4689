"""Validates a configuration and builds the pieces that it names."""
