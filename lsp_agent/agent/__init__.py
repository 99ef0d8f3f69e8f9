"""The agent loop and its parts. Knows no LSP and no ONNX."""
