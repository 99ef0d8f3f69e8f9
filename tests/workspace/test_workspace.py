"""Which files belong, what they contain, and what identifies the tree."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lsp_agent.errors import UserError
from lsp_agent.workspace.workspace import Workspace


def git(root: Path, *args: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *identity, *args], cwd=root, check=True, capture_output=True)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("in_git", [True, False])
def test_ignored_files_and_junk_do_not_belong(root: Path, in_git: bool) -> None:
    write(
        root,
        {
            "a.py": "",
            "pkg/b.py": "",
            "pkg/.gitignore": "*.tmp\n!keep.tmp\n",
            "pkg/x.tmp": "",
            "pkg/keep.tmp": "",
            ".gitignore": "secret.env\n/build/\n*.tmp\n",
            "secret.env": "",
            "build/out.py": "",
            "pkg/build/in.py": "",
            ".venv/lib/x.py": "",
            "env/pyvenv.cfg": "",
            "env/lib/y.py": "",
            "node_modules/m/i.js": "",
            "pkg/__pycache__/b.pyc": "",
            ".lspagentignore": "data/\n",
            "data/big.bin": "",
            ".lsp-agent-1-0.tmp": "",
        },
    )
    if in_git:
        git(root, "init", "-q")
    expected = [".gitignore", ".lspagentignore", "a.py", "pkg/.gitignore", "pkg/b.py", "pkg/build/in.py"]
    workspace = Workspace(root)
    assert workspace.files() == sorted([*expected, "pkg/keep.tmp"])
    asked = ["a.py", "secret.env", "build/new.py", "data/n", "env/lib/z.py", "pkg/n.tmp", "pkg/keep.tmp", "new.py"]
    assert workspace.ignored(asked) == {"secret.env", "build/new.py", "data/n", "env/lib/z.py", "pkg/n.tmp"}


def test_tracked_files_belong_even_if_ignored_or_junk_and_deleted_ones_do_not(root: Path) -> None:
    write(root, {".gitignore": "*.log\n", "kept.log": "", "node_modules/vendored.js": "", "gone.py": ""})
    git(root, "init", "-q")
    git(root, "add", "-f", ".")
    (root / "gone.py").unlink()
    assert Workspace(root).files() == [".gitignore", "kept.log", "node_modules/vendored.js"]


@pytest.mark.parametrize("in_git", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "with space.py",
        "ünï/çode.py",
        "new\nline.py",
        'quo"te.py',
        "tab\t.py",
        "-n",
        "*.py",
        ":(top)x",
        "#x",
        "!x",
        "x\\y",
    ],
)
def test_weird_names(root: Path, in_git: bool, name: str) -> None:
    write(root, {name: "1", ".gitignore": "ignored.py\n"})
    if in_git:
        git(root, "init", "-q")
    workspace = Workspace(root)
    assert set(workspace.files()) == {".gitignore", name}
    assert workspace.read(name) == b"1"
    assert workspace.ignored([name, "ignored.py"]) == {"ignored.py"}


@pytest.mark.parametrize("in_git", [True, False])
def test_names_that_are_not_utf8(root: Path, in_git: bool) -> None:
    Path(os.fsdecode(bytes(root) + b"/b\xff.py")).write_bytes(b"1")
    if in_git:
        git(root, "init", "-q")
    workspace = Workspace(root)
    (name,) = workspace.files()
    assert os.fsencode(name) == b"b\xff.py"
    assert workspace.read(name) == b"1"
    assert workspace.digest()


def test_submodules_and_nested_repositories_are_listed_file_by_file(root: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    write(library, {"lib.py": "", ".gitignore": "*.o\n"})
    git(library, "init", "-q")
    git(library, "add", ".")
    git(library, "commit", "-qm", "1")
    git(root, "init", "-q")
    git(root, "submodule", "add", str(library), "vendor/library")
    write(root, {"vendor/library/new.py": "", "vendor/library/x.o": "", "nested/n.py": ""})
    git(root / "nested", "init", "-q")
    workspace = Workspace(root)
    assert workspace.files() == [
        ".gitmodules",
        "nested/n.py",
        "vendor/library/.gitignore",
        "vendor/library/lib.py",
        "vendor/library/new.py",
    ]
    assert workspace.ignored(["vendor/library/y.o", "vendor/library/z.py"]) == {"vendor/library/y.o"}


def test_a_folder_of_a_bigger_repository_sees_only_itself_and_obeys_the_outer_ignores(root: Path) -> None:
    write(root, {".gitignore": "*.log\n", "outer.py": "", "sub/a.py": "", "sub/x.log": "", "ignored/b.py": ""})
    git(root, "init", "-q")
    git(root, "add", ".")
    assert Workspace(root / "sub").files() == ["a.py"]


def test_a_root_that_an_outer_repository_ignores_is_walked(root: Path) -> None:
    write(root, {".gitignore": "*\n", "project/a.py": "", "project/.gitignore": "x.log\n", "project/x.log": ""})
    git(root, "init", "-q")
    assert Workspace(root / "project").files() == [".gitignore", "a.py"]


def test_git_variables_of_a_calling_hook_do_not_mislead(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, {"a.py": ""})
    git(root, "init", "-q")
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nonexistent")
    assert Workspace(root).files() == ["a.py"]


def test_listing_does_not_run_what_the_repository_configures(root: Path) -> None:
    write(root, {"a.py": ""})
    git(root, "init", "-q")
    hook = root.parent / "evil"
    hook.write_text(f"#!/bin/sh\ntouch {root.parent}/owned\n")
    hook.chmod(0o755)
    git(root, "config", "core.fsmonitor", str(hook))
    assert Workspace(root).files() == ["a.py"]
    assert not (root.parent / "owned").exists()


def test_listing_fetches_nothing_for_a_partial_clone(root: Path) -> None:
    """Of a hostile repository, whose missing objects are to come through a program of its own."""
    write(root, {"a.py": "", ".gitignore": "*.log\n", "x.log": ""})
    git(root, "init", "-q")
    git(root, "add", ".")
    blob = subprocess.run(
        ["git", "rev-parse", ":.gitignore"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()
    git(root, "update-index", "--skip-worktree", ".gitignore")
    (root / ".gitignore").unlink()
    missing = root / ".git/objects" / blob[:2] / blob[2:]
    missing.chmod(0o600)
    missing.unlink()
    owned = root.parent / "owned"
    for key, value in (
        ("core.repositoryFormatVersion", "1"),
        ("extensions.partialClone", "origin"),
        ("remote.origin.promisor", "true"),
        ("remote.origin.url", f"ext::sh -c touch% {owned}"),
        ("protocol.ext.allow", "always"),
    ):
        git(root, "config", key, value)
    assert "a.py" in Workspace(root).files()
    Workspace(root).ignored(["b.py"])
    assert not owned.exists()
    subprocess.run(["git", "ls-files", "--others", "--exclude-standard"], cwd=root, capture_output=True, check=False)
    assert owned.exists(), "plain git would have run it"


def test_a_bare_repository_among_the_files_is_not_asked(root: Path) -> None:
    """Its configuration comes with the code, as everything in the tree does."""
    git(root.parent, "init", "-q", "--bare", str(root))
    git(root, "config", "core.bare", "false")
    git(root, "config", "core.worktree", str(root))
    write(root, {"info/exclude": "b.py\n", "b.py": ""})
    assert "b.py" in Workspace(root).files()


def test_without_git_the_gitignore_files_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, {"a.py": "", "x.log": "", ".gitignore": "*.log\n"})
    git(root, "init", "-q")
    monkeypatch.setenv("PATH", "")
    assert Workspace(root).files() == [".gitignore", "a.py"]


@pytest.mark.parametrize("in_git", [True, False])
def test_links_are_listed_but_not_followed_out_of_the_root(root: Path, in_git: bool) -> None:
    outside = root.parent / "outside"
    write(outside, {"secret.py": "s"})
    write(root, {"a.py": "inside"})
    (root / "link.py").symlink_to("a.py")
    (root / "away").symlink_to(outside)
    (root / "file_away.py").symlink_to(outside / "secret.py")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    if in_git:
        git(root, "init", "-q")
    workspace = Workspace(root)
    assert workspace.files() == ["a.py", "away", "dangling", "file_away.py", "link.py", "loop"]
    assert workspace.read("link.py") == b"inside"
    before = workspace.digest()
    write(outside, {"secret.py": "changed"})
    assert workspace.digest() == before
    for path in ("file_away.py", "away/secret.py", "../outside/secret.py", "/etc/passwd", ".git/config", "", "a//b"):
        with pytest.raises(UserError):
            workspace.read(path)
    with pytest.raises(UserError):
        workspace.read("pipe")
    with pytest.raises(FileNotFoundError):
        workspace.read("missing.py")


def test_tracked_files_behind_a_folder_that_became_a_link_are_not_listed(root: Path) -> None:
    write(root, {"pkg/a.py": ""})
    git(root, "init", "-q")
    git(root, "add", ".")
    (root / "pkg").rename(root.parent / "moved")
    (root / "pkg").symlink_to(root.parent / "moved")
    workspace = Workspace(root)
    assert workspace.files() == ["pkg"]
    assert workspace.ignored(["new.py", "pkg/a.py", "other.py"]) == {"pkg/a.py"}


def test_unsaved_buffers_come_first_and_new_ones_belong(root: Path) -> None:
    write(root, {"a.py": "disk", ".gitignore": "*.log\n", "x.log": "", "real.py": "disk"})
    (root / "alias.py").symlink_to("real.py")
    git(root, "init", "-q")
    overlay = {"a.py": b"buffer", "new/n.py": b"n", "x.log": b"", "y.log": b"", "alias.py": b"through"}
    workspace = Workspace(root, overlay)
    assert workspace.files() == [".gitignore", "a.py", "alias.py", "new/n.py", "real.py"]
    assert workspace.read("a.py") == b"buffer"
    assert workspace.read("real.py") == workspace.read("alias.py") == b"through"
    assert workspace.digest() != Workspace(root).digest()
    write(root, {"a.py": "buffer", "new/n.py": "n", "real.py": "through"})
    assert workspace.digest() == Workspace(root).digest()


def test_the_digest_sees_content_names_modes_and_links(root: Path) -> None:
    write(root, {"a.py": "1", "b.py": "2"})
    seen = {Workspace(root).digest()}

    def changed() -> bool:
        digest = Workspace(root).digest()
        fresh = digest not in seen
        seen.add(digest)
        return fresh

    assert not changed()
    os.utime(root / "a.py", (1, 1))
    assert not changed()
    (root / "a.py").write_text("2")
    assert changed()
    (root / "a.py").chmod(0o755)
    assert changed()
    (root / "b.py").rename(root / "c.py")
    assert changed()
    (root / "c.py").unlink()
    (root / "c.py").symlink_to("a.py")
    assert changed()


def test_a_missing_root_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        Workspace(tmp_path / "nowhere")
