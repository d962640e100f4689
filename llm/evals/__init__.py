"""What a trained model is judged by: one file and one YAML each, the same in eval.py and along a training run."""
