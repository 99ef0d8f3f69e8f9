"""Inference: checkpoints in, graphs, sessions, state, generation, and the process that serves them."""
