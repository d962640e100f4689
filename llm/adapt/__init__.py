"""Adapts a trained decoder: lower rank, growth in depth and width, and training beside frozen weights."""
