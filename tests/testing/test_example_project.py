"""The example project is green, each of its bugs makes tests fail, and taking the bug back makes it green again."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROJECT = EXAMPLES / "shopping-basket"
BUGS = sorted(path.stem for path in (PROJECT / "bugs").glob("*.patch"))


@pytest.fixture(scope="module")
def make_buggy():
    spec = importlib.util.spec_from_file_location("make_buggy", EXAMPLES / "make_buggy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_buggy


def test_there_is_something_to_choose_from():
    assert len(BUGS) >= 6
    touched = {line for bug in BUGS for line in (PROJECT / "bugs" / f"{bug}.patch").read_text().splitlines()[:1]}
    assert len(touched) >= 6, "the bugs are spread over the modules"


def test_the_clean_project_is_green(make_buggy, tmp_path, run):
    make_buggy("clean", tmp_path / "copy")
    result = run(tmp_path / "copy")
    assert result.green
    assert len(result.results) >= 30


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_makes_tests_fail_and_its_reversal_heals_them(make_buggy, tmp_path, run, bug):
    copy = tmp_path / "copy"
    make_buggy(bug, copy)
    assert not (copy / "bugs").exists()
    broken = run(copy)
    assert 1 <= len(broken.failing) <= 3 and broken.complete and not broken.error
    if "mutable" in bug:  # state that outlives a test: the failures must not depend on which other tests ran
        assert set(run(copy, *broken.failing).failing) == set(broken.failing)
    shutil.copytree(PROJECT / "src", copy / "src", dirs_exist_ok=True)
    assert run(copy, *broken.failing).green


def test_the_command_line(tmp_path):
    script = str(EXAMPLES / "make_buggy.py")
    listed = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == BUGS
    subprocess.run([sys.executable, script, ",".join(BUGS[:2]), tmp_path / "two"], check=True, capture_output=True)
    assert (tmp_path / "two/pyproject.toml").is_file()
    for arguments in (["no-such-bug", tmp_path / "x"], [BUGS[0], tmp_path / "two"]):
        refused = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr and refused.stderr.count("\n") == 1


def test_a_copy_inside_a_repository_is_patched_too(make_buggy, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    make_buggy(BUGS[0], tmp_path / "below" / "copy")
    changed = [
        path
        for path in (tmp_path / "below/copy/src").rglob("*.py")
        if path.read_text() != (PROJECT / path.relative_to(tmp_path / "below/copy")).read_text()
    ]
    assert len(changed) == 1
