"""Objectives: what a decoder is trained to predict, how it is scored, and how text is drawn from it."""
