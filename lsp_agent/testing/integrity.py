"""Which files a run may not change: tests, conftest, test configuration, test data."""

from __future__ import annotations

import configparser
import fnmatch
import os
import posixpath
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

CONFIGURATION = frozenset(
    {
        *("pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini", "tox.toml", "setup.cfg"),
        *("pyproject.toml", "noxfile.py", ".coveragerc", "conftest.py", "pytest_plugins.py"),
        *("sitecustomize.py", "usercustomize.py"),
    }
)
"""Names that decide, anywhere in the tree, which tests run and how. The whole file is protected."""
_INI = (("pytest.ini", "pytest"), (".pytest.ini", "pytest"), ("tox.ini", "pytest"), ("setup.cfg", "tool:pytest"))


class ProtectedFiles:
    """Answers `path in protected` for paths relative to `root`, from pytest's own configuration and conventions.

    A path that leads to a protected file through a symbolic link is protected too. The configuration is read once,
    from the user's tree: a run cannot weaken it by editing.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        options = pytest_options(root)
        self.patterns = ["test_*.py", "*_test.py", *_words(options.get("python_files"))]
        self.folders = [
            PurePosixPath(p.strip("/")) for p in _words(options.get("testpaths")) if p.strip("./") and "*" not in p
        ]

    def __contains__(self, path: object) -> bool:
        relative = PurePosixPath(posixpath.normpath(str(path)))
        target = self._target(str(path))
        return self._is_protected(relative) or (target is not None and self._is_protected(target))

    def _target(self, path: str) -> PurePosixPath | None:
        """What `path` leads to, symbolic links followed, relative to the root; None outside of it."""
        try:
            return PurePosixPath(os.path.realpath(self.root / path)).relative_to(self.root)
        except (OSError, ValueError):
            return None

    def _is_protected(self, relative: PurePosixPath) -> bool:
        name = relative.name
        if name in CONFIGURATION or name.endswith(".pth"):
            return True
        if name.endswith(".py") and any(_matches(relative, pattern) for pattern in self.patterns):
            return True
        if any(folder in relative.parents and folder != PurePosixPath(".") for folder in self.folders):
            return True
        return _in_test_folder(relative)


def _in_test_folder(path: PurePosixPath) -> bool:
    """Whether a folder on the way is the test folder of the project or of a package: `tests/`, `pkg/tests/`."""
    return any(part in ("tests", "test") for part in path.parts[:-1])


def _matches(path: PurePosixPath, pattern: str) -> bool:
    """Match like pytest: against the name, or the whole path when the pattern has a slash."""
    if "/" in pattern:
        return fnmatch.fnmatch(str(path), pattern) or fnmatch.fnmatch(str(path), f"*/{pattern}")
    return fnmatch.fnmatch(path.name, pattern)


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return value.split()
    return [str(item) for item in value] if isinstance(value, list) else []


def pytest_options(root: Path) -> dict[str, Any]:
    """Return the project's pytest options, from the file that pytest itself would take; {} when none is readable."""
    for name in ("pytest.toml", ".pytest.toml"):
        table = _toml(root / name).get("pytest")
        if isinstance(table, dict):
            return table
    for name, section in _INI[:2]:
        if (root / name).is_file():
            return _ini(root / name, section)
    tool = _toml(root / "pyproject.toml").get("tool", {})
    table = tool.get("pytest") if isinstance(tool, dict) else None
    if isinstance(table, dict):
        ini = table.get("ini_options")
        return ini if isinstance(ini, dict) else table
    for name, section in _INI[2:]:
        options = _ini(root / name, section)
        if options:
            return options
    return {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _ini(path: Path, section: str) -> dict[str, Any]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, "utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser[section]) if parser.has_section(section) else {}
