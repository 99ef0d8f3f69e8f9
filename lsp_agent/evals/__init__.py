"""Executable tasks and the harness that measures the agent on them."""
