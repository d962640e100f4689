"""Positions: how a score learns the distance between query and key."""
