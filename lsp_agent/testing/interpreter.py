"""Finds the project's Python interpreter and asks it what a test run must know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lsp_agent.errors import UserError
from lsp_agent.testing.environment import scrubbed_environment

_QUESTION = """
import importlib.util, json, os, sys, sysconfig
mapped = [p for n, m in list(sys.modules.items()) if n.startswith("__editable__")
          for p in getattr(m, "MAPPING", {}).values()]
print(json.dumps({
    "executable": sys.executable, "version": list(sys.version_info[:3]),
    "prefixes": [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix],
    "path": [p for p in sys.path if p] + mapped,
    "pytest": importlib.util.find_spec("pytest") is not None,
}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python that has pytest."""

    executable: Path
    """Absolute; inside a virtual environment the environment's own link."""
    version: tuple[int, int, int]
    prefixes: tuple[Path, ...]
    """Installation folders: the environment's and the base's."""
    import_path: tuple[Path, ...]
    """Its `sys.path` outside of any project, editable installs included."""


def candidates(root: Path, environment: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """Yield (interpreter, where it comes from) in the order of preference; paths may not exist."""
    if environment.get("VIRTUAL_ENV"):
        yield Path(environment["VIRTUAL_ENV"]) / "bin" / "python", "VIRTUAL_ENV"
    for name in (".venv", "venv", "env"):
        if (root / name / "pyvenv.cfg").is_file():
            yield root / name / "bin" / "python", f"the folder {name}"
    if environment.get("CONDA_PREFIX"):
        yield Path(environment["CONDA_PREFIX"]) / "bin" / "python", "CONDA_PREFIX"


def find_interpreter(
    root: Path,
    explicit: Path | None = None,
    environment: Mapping[str, str] | None = None,
    wrap: Callable[[Sequence[str]], list[str]] = list,
) -> Interpreter:
    """Return the interpreter for the tests of `root`.

    Order: the one that was set, VIRTUAL_ENV, `.venv`, `venv` or `env` in the root (uv and poetry put theirs
    there too), CONDA_PREFIX, else the interpreter that runs lsp-agent. The first that exists is taken, so that a
    project's environment without pytest is an error rather than a run in a wrong one. `wrap` puts the command that
    asks the interpreter into a sandbox: a workspace may bring its own. Raises UserError.
    """
    environment = os.environ if environment is None else environment
    if explicit is not None:
        path = Path(os.path.expanduser(explicit))  # noqa: PTH111 - Path.expanduser() raises for a user that is not there
        if path.is_dir():
            path = path / "bin" / "python"
        if not path.is_file():
            raise UserError(f"The interpreter {explicit} does not exist: set the path of a Python that has pytest.")
        return _ask(path, wrap, "the setting")
    for path, origin in candidates(root, environment):
        if path.is_file():
            return _ask(path, wrap, origin)
    return _ask(Path(sys.executable), wrap, "the Python that runs lsp-agent")


def _ask(path: Path, wrap: Callable[[Sequence[str]], list[str]], origin: str) -> Interpreter:
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would leave the virtual environment
    try:
        reply = subprocess.run(
            wrap([str(path), "-c", _QUESTION]),
            capture_output=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
            cwd="/",
            env=scrubbed_environment(),
            check=True,
        )
        facts = json.loads(reply.stdout.splitlines()[-1])
        found = Interpreter(
            _path(facts["executable"] or str(path)),
            (int(facts["version"][0]), int(facts["version"][1]), int(facts["version"][2])),
            tuple(dict.fromkeys(_path(p) for p in facts["prefixes"])),
            tuple(dict.fromkeys(_path(p) for p in facts["path"])),
        )
        has_pytest = bool(facts["pytest"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"The interpreter {path} (from {origin}) does not work: choose another Python.") from error
    if not has_pytest:
        raise UserError(
            f"pytest is not installed for {path} (from {origin}): install it there with `{path} -m pip install pytest`."
        )
    return found


def _path(text: str) -> Path:
    """A path of the interpreter's answer, which a workspace may have made up."""
    if "\0" in text:
        raise ValueError("a path with a null byte")
    return Path(text)
