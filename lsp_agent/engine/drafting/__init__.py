"""Guessing the next tokens by copying, and verifying several in one run."""
