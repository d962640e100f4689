"""Decoders as Hugging Face folders, and Hugging Face folders as decoders."""
