"""What some tests need beside the project: they are left out where it is missing, and say so."""

import importlib.metadata

import pytest


def needs(distribution: str) -> pytest.MarkDecorator:
    """Leave a test out where this package is not installed."""
    there = any(found.name == distribution for found in importlib.metadata.distributions())
    return pytest.mark.skipif(not there, reason=f"{distribution} is not installed")
