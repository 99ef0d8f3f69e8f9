"""Make a fresh copy of the example project with one or more bugs in it.

python examples/make_buggy.py --list
python examples/make_buggy.py page-off-by-one /tmp/demo
python examples/make_buggy.py page-off-by-one,percent-rounding /tmp/demo
python examples/make_buggy.py clean /tmp/demo
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent / "shopping-basket"
CLEAN = "clean"


def bugs() -> list[str]:
    """Return the names of the bugs that there are."""
    return sorted(path.stem for path in (PROJECT / "bugs").glob("*.patch"))


def make_buggy(names: str, destination: Path) -> None:
    """Copy the project to `destination`, which must not exist, and apply the bugs of a comma-separated list."""
    chosen = [] if names == CLEAN else names.split(",")
    unknown = [name for name in chosen if name not in bugs()]
    if unknown:
        raise SystemExit(f"There is no bug named {unknown[0]!r}: choose from {', '.join([CLEAN, *bugs()])}.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise SystemExit(f"{destination} exists already: choose a new folder.")
    # The bugs stay behind: a copy that held them would hold the fixes too.
    ignore = shutil.ignore_patterns("bugs", "__pycache__", ".pytest_cache", ".venv")
    shutil.copytree(PROJECT, destination, ignore=ignore, dirs_exist_ok=True)
    # Were the copy inside a repository, git would look for the patched files at that repository's root.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(destination.resolve().parent)}
    for name in chosen:
        patch = PROJECT / "bugs" / f"{name}.patch"
        subprocess.run(["git", "apply", str(patch)], cwd=destination, env=environment, check=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make a fresh copy of the example project with bugs in it.")
    parser.add_argument("--list", action="store_true", help="list the bugs and leave")
    parser.add_argument("names", nargs="?", help=f"bugs to put in, separated by commas, or '{CLEAN}'")
    parser.add_argument("destination", nargs="?", type=Path, help="folder to make; it must be new or empty")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(bugs()))
        return
    if arguments.names is None or arguments.destination is None:
        parser.error("say which bug, and where the copy goes")
    make_buggy(arguments.names, arguments.destination)
    print(f"{arguments.destination}: the project with {arguments.names}", file=sys.stderr)


if __name__ == "__main__":
    main()
