"""Attention: how a token reads the tokens before it."""
