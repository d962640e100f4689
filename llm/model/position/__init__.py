"""Positions: how the score of a query and a key depends on the distance between them."""
