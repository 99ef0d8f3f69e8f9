"""The engine as a process of its own: server, client, start."""
