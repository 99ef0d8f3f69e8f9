"""What of the folders that an interpreter names may be seen by code of the workspace."""

import socket
from pathlib import Path

import pytest

from lsp_agent.testing.installation import may_be_seen, needed_by


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    for name in (
        "work/library/src",
        ".local/share/keyrings",
        ".local/share/uv/python/cpython-3.12/lib/python3.12",
        ".local/lib/python3.12/site-packages",
        ".virtualenvs/one/lib",
        ".ssh/lib/python3.12",
    ):
        (folder / name).mkdir(parents=True)
    (folder / ".virtualenvs/one/pyvenv.cfg").touch()
    (folder / ".local/share/uv/python/cpython-3.12/lib/python3.12/os.py").touch()
    (folder / ".ssh/lib/python3.12/os.py").touch()
    (folder / ".bash_history").touch()
    (folder / "tool").touch(0o755)
    (folder / "work/away").symlink_to(folder / ".local/share/keyrings")
    return folder


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("work/library/src", True),
        (".local/share/uv/python/cpython-3.12", True),
        (".local/share/uv/python/cpython-3.12/lib/python3.12", True),
        (".local/lib/python3.12/site-packages", True),
        (".virtualenvs/one", True),
        (".virtualenvs/one/lib", True),
        ("tool", True),
        (".", False),
        ("..", False),
        (".local", False),
        (".local/share/keyrings", False),
        ("work/away", False),
        (".ssh", False),
        (".ssh/lib/python3.12", False),
        (".bash_history", False),
        ("missing", False),
    ],
)
def test_what_of_the_home_folder_may_be_seen(home: Path, path: str, seen: bool) -> None:
    assert may_be_seen(Path(f"{home}/{path}").resolve() if path == ".." else home / path, home, [home]) is seen


def test_no_socket_may_be_seen(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("docker.sock")
        assert not may_be_seen(tmp_path / "docker.sock", home, [tmp_path])


def test_of_run_only_installations_may_be_seen(home: Path) -> None:
    for path in ("/run", "/run/lock", "/run/user"):
        assert not may_be_seen(Path(path), home, [home, Path("/run")])


def test_what_a_virtual_environment_needs(home: Path, tmp_path: Path) -> None:
    base = home / ".local/share/uv/python/cpython-3.12"
    (base / "bin").mkdir()
    (base / "bin/python3.12").touch(0o755)
    copied = tmp_path / "project/.venv"
    (copied / "bin").mkdir(parents=True)
    (copied / "bin/python").touch(0o755)
    (copied / "pyvenv.cfg").write_text(f"include-system-site-packages = false\nhome = {base}/bin\n")
    library = copied / "lib/python3.12/site-packages"
    library.mkdir(parents=True)
    (library / "editable.pth").write_bytes(b"import os\n# no\n/editable/src\nrelative\n/nul\0\n\xff\n")
    needed = needed_by(copied / "bin/python")
    assert {copied, base, library, Path("/editable/src")} <= set(needed)
    assert not [path for path in needed if "\0" in str(path)]
    linked = tmp_path / "linked/bin"
    linked.mkdir(parents=True)
    (linked / "python").symlink_to(base / "bin/python3.12")
    assert {linked.parent, base, base / "bin/python3.12"} <= set(needed_by(linked / "python"))
