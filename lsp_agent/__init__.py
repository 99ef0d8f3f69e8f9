"""lsp-agent: agentic code actions for every editor, over plain LSP."""

__version__ = "0.1.0"
