"""Checkpoints in: GGUF files and Hugging Face folders become model packages."""
