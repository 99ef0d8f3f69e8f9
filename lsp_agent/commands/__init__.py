"""The subcommands of `lsp-agent`, one file each; `lsp_agent.cli` imports only the one that is run."""
