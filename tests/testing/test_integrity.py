import textwrap
from pathlib import Path

import pytest

from lsp_agent.testing.integrity import ProtectedFiles, pytest_options
from lsp_agent.testing.pytest_runner import PytestRunner


def write(root: Path, name: str, text: str) -> None:
    (root / name).write_text(textwrap.dedent(text))


@pytest.mark.parametrize(
    "path",
    [
        "test_a.py",
        "a_test.py",
        "pkg/test_a.py",
        "tests/helpers.py",
        "tests/data/input.json",
        "pkg/tests/golden.txt",
        "test/x.bin",
        "conftest.py",
        "pkg/conftest.py",
        "pyproject.toml",
        "setup.cfg",
        "tox.ini",
        "pytest.ini",
        ".pytest.ini",
        "pytest.toml",
        "sub/pytest.ini",
        "sitecustomize.py",
        "hook.pth",
    ],
)
def test_protected_by_convention(tmp_path, path):
    assert path in ProtectedFiles(tmp_path)
    assert PytestRunner(tmp_path).is_protected(path)


@pytest.mark.parametrize(
    "path", ["pkg/a.py", "testing/runner.py", "latest.py", "src/contest.py", "README.md", "mytests.py", "attest/a.py"]
)
def test_not_protected(tmp_path, path):
    assert path not in ProtectedFiles(tmp_path)


CONFIGURATIONS = {
    "pytest.ini": "[pytest]\npython_files = check_*.py spec/*.py\ntestpaths = quality ./checks/",
    "tox.ini": "[tox]\n[pytest]\npython_files = check_*.py spec/*.py\ntestpaths = quality ./checks/",
    "setup.cfg": "[tool:pytest]\npython_files =\n    check_*.py\n    spec/*.py\ntestpaths = quality checks",
    "pyproject.toml": """
        [tool.pytest.ini_options]
        python_files = ["check_*.py", "spec/*.py"]
        testpaths = "quality checks"
    """,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_protected_by_configuration(tmp_path, name):
    write(tmp_path, name, CONFIGURATIONS[name])
    protected = ProtectedFiles(tmp_path)
    for path in ("check_a.py", "pkg/check_b.py", "spec/a.py", "pkg/spec/a.py", "quality/a.py", "checks/data.txt"):
        assert path in protected, path
    for path in ("pkg/a.py", "spec/a.txt", "unchecked.py"):
        assert path not in protected, path


def test_the_source_folder_as_testpath_does_not_protect_everything(tmp_path):
    write(tmp_path, "pytest.ini", "[pytest]\ntestpaths = .\n")
    assert "pkg/a.py" not in ProtectedFiles(tmp_path)


def test_protection_is_read_once(tmp_path):
    """A run that could edit the configuration could otherwise free the tests for its next turn."""
    write(tmp_path, "pytest.ini", "[pytest]\npython_files = check_*.py\n")
    runner = PytestRunner(tmp_path)
    assert runner.is_protected("check_a.py")
    (tmp_path / "pytest.ini").unlink()
    assert runner.is_protected("check_a.py")


def test_a_path_cannot_be_disguised(tmp_path):
    write(tmp_path, "pytest.ini", "[pytest]\ntestpaths = checks\n")
    protected = ProtectedFiles(tmp_path)
    for path in ("./tests/a.py", "pkg/../tests/a.py", "pkg/../conftest.py", "tests//a.py", "lib/../checks/a.py"):
        assert path in protected, path


def test_a_symbolic_link_is_no_way_around(tmp_path):
    for folder in ("src", "tests", "checks"):
        (tmp_path / folder).mkdir()
    write(tmp_path, "pytest.ini", "[pytest]\ntestpaths = checks\n")
    for name in ("tests/helper.py", "checks/data.txt", "src/plain.py"):
        write(tmp_path, name, "")
    links = {"helper.py": "../tests/helper.py", "twice.py": "helper.py", "data": "../checks", "new.py": "../tests/n.py"}
    for name, target in {**links, "plain_link.py": "plain.py", "loop.py": "loop.py", "away.py": "/etc/hosts"}.items():
        (tmp_path / "src" / name).symlink_to(target)
    (tmp_path / "other").symlink_to(tmp_path)
    for root in (tmp_path, tmp_path / "other"):
        runner = PytestRunner(root)
        for path in ("src/helper.py", "src/twice.py", "src/data/data.txt", "src/new.py", "other/tests/helper.py"):
            assert runner.is_protected(path), path
        for path in ("src/plain.py", "src/plain_link.py", "src/loop.py", "src/away.py", "src/missing.py", "nul\0.py"):
            assert not runner.is_protected(path), path


@pytest.mark.parametrize("text", ["[pytest", "\x00", "[tool.pytest", "a = " + "[" * 10_000])
def test_unreadable_configuration_is_no_error(tmp_path, text):
    for name in ("pyproject.toml", "pytest.ini", "setup.cfg"):
        (tmp_path / name).write_text(text)
    assert pytest_options(tmp_path) == {}
    assert "tests/a.py" in ProtectedFiles(tmp_path)
