"""Continuous batching: whose turn it is, and steps of all who decode."""
