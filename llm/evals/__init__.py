"""Evaluations of a trained model, one file and one YAML each, used by eval.py and during training."""
