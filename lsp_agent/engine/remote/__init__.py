"""`ChatModel` over any OpenAI-compatible server."""
