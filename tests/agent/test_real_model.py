"""The whole way with a real model: `lsp-agent fix` mends a real bug, pytest agrees, and undo restores every byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lsp_agent.models.store import InstalledModel

pytestmark = pytest.mark.model

CODE = '''"""Times of the laps of a race, in seconds."""


def mean(times):
    """Return the arithmetic mean of the times; 0.0 when there are none."""
    if not times:
        return 0.0
    return sum(times) / (len(times) - 1)


def clamp(value, low, high):
    """Return value, but no less than low and no more than high."""
    return max(low, min(value, high))


def fastest(laps):
    """Return the name of the driver with the least time; laps maps names to times."""
    return min(laps, key=laps.get)


def format_time(seconds):
    """Return a time as minutes and seconds: 75 is '1:15'."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}:{rest:02d}"
'''
# The divisor that belongs to a sample's variance: a mean of one lap even divides by zero.
TEST = """import pytest

from laps import clamp, fastest, format_time, mean


def test_mean_of_laps():
    assert mean([60, 70, 80]) == 70


def test_mean_of_one_lap():
    assert mean([5]) == 5


def test_mean_of_nothing():
    assert mean([]) == 0.0


@pytest.mark.parametrize(("value", "expected"), [(5, 5), (-1, 0), (99, 10)])
def test_clamp(value, expected):
    assert clamp(value, 0, 10) == expected


def test_fastest():
    assert fastest({"ann": 61.5, "bob": 60.2}) == "bob"


def test_format_time():
    assert format_time(75) == "1:15"
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=280)


def contents(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in root.iterdir() if p.is_file()}


def test_a_real_model_fixes_a_real_bug(small_model: InstalledModel, tmp_path: Path) -> None:
    root = tmp_path / "race"
    root.mkdir()
    (root / "laps.py").write_text(CODE)
    (root / "test_laps.py").write_text(TEST)
    (root / "notes.txt").write_bytes(b"untracked \xff bytes\r\n")
    before = contents(root)
    pytest_on_tree = ("pytest", "-q", "-p", "no:cacheprovider", str(root), "--rootdir", str(root))
    assert command(*pytest_on_tree).returncode == 1

    fixed = command("lsp_agent", "fix", str(root), "--model", small_model.name, "--max-seconds", "200", "--json")
    assert fixed.returncode == 0, (fixed.stdout, fixed.stderr)
    shown = json.loads(fixed.stdout)
    assert shown["status"] == "green"
    assert shown["fixed"] == ["test_laps.py::test_mean_of_laps", "test_laps.py::test_mean_of_one_lap"]
    assert shown["still_failing"] == shown["broken"] == shown["flaky"] == []
    assert shown["turns"] >= 1 and shown["tokens"]["completion"] > 0
    records = [json.loads(line) for line in Path(shown["trajectory"]).read_text().splitlines()]
    assert any(r["kind"] == "ask" and any(r["answers"]) for r in records), "the model's own words mended it"

    after = contents(root)
    assert {name for name in before if after[name] != before[name]} == {"laps.py"} and after.keys() == before.keys()
    passed = command(*pytest_on_tree)
    assert passed.returncode == 0 and "8 passed" in passed.stdout, passed.stdout

    undone = command("lsp_agent", "undo", shown["run"], "--path", str(root))
    assert undone.returncode == 0, undone.stderr
    assert contents(root) == before
