"""Skips tests whose optional packages are not installed, with the reason."""

import importlib.metadata

import pytest


def needs(distribution: str) -> pytest.MarkDecorator:
    """Skip a test if this package is not installed."""
    there = any(found.name == distribution for found in importlib.metadata.distributions())
    return pytest.mark.skipif(not there, reason=f"{distribution} is not installed")
