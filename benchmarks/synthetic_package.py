"""Makes a model package of random weights in the shape of a known model, for scripts that want one that stays.

    python benchmarks/synthetic_package.py FOLDER [--shape qwen3-coder-next] [--scheme int4] [--layers 48]

`lsp-agent bench` makes and removes its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lsp_agent.engine.quantisation import SCHEMES
from lsp_agent.engine.synthetic import make, with_layers
from lsp_agent.models.manifest import find, shipped


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--shape", default="qwen3-coder-next", choices=[model.name for model in shipped() if model.config]
    )
    parser.add_argument("--scheme", default="int4", choices=list(SCHEMES))
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    config = find(arguments.shape).decoder_config()
    assert config is not None
    make(arguments.folder, with_layers(config, arguments.layers), arguments.scheme)


if __name__ == "__main__":
    main()
