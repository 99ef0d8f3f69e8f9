"""`python -m lsp_agent` is the same program as the `lsp-agent` console script."""

from lsp_agent.cli import main

if __name__ == "__main__":
    main()
