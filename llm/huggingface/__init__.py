"""Converts decoders to Hugging Face folders, and Hugging Face folders to decoders."""
