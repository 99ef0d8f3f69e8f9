"""The model: checkpoints in, graphs, sessions, state, generation, server and client."""
