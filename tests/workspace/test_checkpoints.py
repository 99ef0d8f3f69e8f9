"""Apply, undo, recover: nothing of the user's is ever lost, and git of the user's never touched."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lsp_agent.errors import ExitCode, UserError
from lsp_agent.workspace import checkpoints as checkpoints_module
from lsp_agent.workspace import files, transaction
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.checkpoints import Checkpoints, find_root
from lsp_agent.workspace.workspace import Workspace

BOM_CRLF = b"\xef\xbb\xbfone\r\ntwo\r\nthree\r\nfour\r\nno newline"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "a.py").write_bytes(b"1\n2\n3\n4\n5\n6\n7\n8\n9\n")
    (folder / "b.py").write_bytes(BOM_CRLF)
    (folder / "bin").write_bytes(b"\0\xff\0")
    return folder


@pytest.fixture
def checkpoints(root: Path, tmp_path: Path) -> Checkpoints:
    return Checkpoints(root, tmp_path / "state")


def picture(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(place.relative_to(root)): (place.stat().st_mode, place.read_bytes() if place.is_file() else b"")
        for place in sorted(root.rglob("*"))
        if ".git" not in place.relative_to(root).parts
    }


def run(checkpoints: Checkpoints, run_id: str, *edits: tuple[str, bytes | None], skip: tuple[str, ...] = ()) -> None:
    root = checkpoints.root
    changes = [FileChange(path, files.read_or_none(root / path), after) for path, after in edits]
    checkpoints.begin(run_id, Workspace(root))
    checkpoints.apply(run_id, changes, skip=skip)


def statuses(checkpoints: Checkpoints) -> dict[str, str]:
    return {info.id: info.status for info in checkpoints.runs()}


def test_apply_then_undo_then_redo_is_byte_exact(root: Path, checkpoints: Checkpoints) -> None:
    (root / "b.py").chmod(0o755)
    (root / "a.py").chmod(0o640)
    before = picture(root)
    run(
        checkpoints,
        "r1",
        ("a.py", b"x\r\n\r\x00"),
        ("b.py", None),
        ("bin", b""),
        ("new/deep/n.py", b"\xff\xfe"),
        ("new/empty", b""),
    )
    after = picture(root)
    assert after["a.py"][1] == b"x\r\n\r\x00"
    assert after["a.py"][0] & 0o777 == 0o640
    assert "b.py" not in after
    assert after["new/deep/n.py"][1] == b"\xff\xfe"
    result = checkpoints.undo()
    assert picture(root) == before
    assert result.run_id == "r1"
    assert {change.path for change in result.changes} == {"a.py", "b.py", "bin", "new/deep/n.py", "new/empty"}
    assert statuses(checkpoints) == {"r1": "undone", "undo-1-r1": "applied"}
    checkpoints.undo(result.undo_id)
    assert picture(root) == after
    assert statuses(checkpoints)["r1"] == "applied"
    assert checkpoints.undo().undo_id == "undo-3-r1"
    assert picture(root) == before


def test_undo_keeps_later_edits_that_merge(root: Path, checkpoints: Checkpoints) -> None:
    run(checkpoints, "r1", ("a.py", b"1\ntwo\n3\n4\n5\n6\n7\n8\n9\n"), ("b.py", BOM_CRLF.replace(b"one", b"ONE")))
    (root / "a.py").write_bytes(b"1\ntwo\n3\n4\n5\n6\n7\nEIGHT\n9\n")
    (root / "b.py").write_bytes(BOM_CRLF.replace(b"one", b"ONE").replace(b"no newline", b"user's, no newline"))
    result = checkpoints.undo("r1")
    assert (root / "a.py").read_bytes() == b"1\n2\n3\n4\n5\n6\n7\nEIGHT\n9\n"
    assert (root / "b.py").read_bytes() == BOM_CRLF.replace(b"no newline", b"user's, no newline")
    assert set(result.merged) == {"a.py", "b.py"}


def test_undo_of_an_earlier_run_keeps_the_later_run(root: Path, checkpoints: Checkpoints) -> None:
    run(checkpoints, "r1", ("a.py", b"1\ntwo\n3\n4\n5\n6\n7\n8\n9\n"), ("c.py", b"c"))
    run(checkpoints, "r2", ("a.py", b"1\ntwo\n3\n4\n5\n6\n7\n8\nNINE\n"))
    checkpoints.undo("r1")
    assert (root / "a.py").read_bytes() == b"1\n2\n3\n4\n5\n6\n7\n8\nNINE\n"
    assert not (root / "c.py").exists()
    checkpoints.undo()
    assert (root / "a.py").read_bytes() == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    with pytest.raises(UserError, match="nothing to undo") as caught:
        checkpoints.undo()
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.parametrize(
    ("path", "after", "edit"),
    [
        ("a.py", b"one\n2\n3\n4\n5\n6\n7\n8\n9\n", b"ONE!\n2\n3\n4\n5\n6\n7\n8\n9\n"),
        ("bin", b"\0new", b"\0newer"),
        ("created.py", b"created", b"created and edited"),
        ("b.py", None, b"made again"),
        ("a.py", b"x", None),
    ],
)
def test_a_conflict_refuses_everything(
    root: Path, checkpoints: Checkpoints, path: str, after: bytes | None, edit: bytes | None
) -> None:
    run(checkpoints, "r1", ("z_other.py", b"z"), (path, after))
    if edit is None:
        (root / path).unlink()
    else:
        (root / path).write_bytes(edit)
    before = picture(root)
    with pytest.raises(UserError, match=path) as caught:
        checkpoints.undo()
    assert caught.value.exit_code == ExitCode.NOT_GREEN
    assert picture(root) == before
    assert statuses(checkpoints) == {"r1": "applied"}


def test_a_file_that_changed_in_the_meantime_stops_the_whole_apply(root: Path, checkpoints: Checkpoints) -> None:
    before = picture(root)
    checkpoints.begin("r1", Workspace(root))
    wanted = [FileChange("bin", b"\0\xff\0", b"new"), FileChange("a.py", b"stale", b"new")]
    with pytest.raises(UserError, match=r"a\.py was changed"):
        checkpoints.apply("r1", wanted)
    with pytest.raises(UserError, match=r"a\.py was changed"):
        checkpoints.apply("r1", [FileChange("bin", b"\0\xff\0", b"new"), FileChange("a.py", None, b"new")])
    assert picture(root) == before
    checkpoints.complete("r1")
    assert statuses(checkpoints) == {"r1": "unchanged"}


def test_a_save_between_the_check_and_the_write_is_noticed(
    root: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = transaction._stage

    def stage_while_the_user_saves(write: transaction._Write, content: bytes) -> None:
        stage(write, content)
        (root / "bin").write_bytes(b"saved by the user")

    before = picture(root)
    checkpoints.begin("r1", Workspace(root))
    monkeypatch.setattr(transaction, "_stage", stage_while_the_user_saves)
    with pytest.raises(UserError, match="bin was changed"):
        checkpoints.apply("r1", [FileChange("a.py", before["a.py"][1], b"x"), FileChange("bin", b"\0\xff\0", b"y")])
    monkeypatch.undo()
    assert (root / "bin").read_bytes() == b"saved by the user"
    assert (root / "a.py").read_bytes() == before["a.py"][1]
    assert set(picture(root)) == set(before)


def test_read_only_files_folders_and_links_are_clear_errors(root: Path, checkpoints: Checkpoints) -> None:
    (root / "a.py").chmod(0o444)
    (root / "link.py").symlink_to("b.py")
    (root / "away.py").symlink_to("/etc/hostname")
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    before = (root / "a.py").read_bytes()
    checkpoints.begin("r1", Workspace(root))
    for path, content, word in [
        ("a.py", before, "read-only"),
        ("away.py", b"", "leads out"),
        ("folder", b"", "not a regular file"),
        ("pipe", b"", "not a regular file"),
        ("../x", None, "not a path inside"),
        (".git/hooks/post-commit", None, "git's own"),
    ]:
        with pytest.raises(UserError, match=word):
            checkpoints.apply("r1", [FileChange(path, content, b"new")])
    with pytest.raises(UserError, match="symbolic link"):
        checkpoints.apply("r1", [FileChange("link.py", BOM_CRLF, None)])
    with pytest.raises(UserError, match="same file"):
        checkpoints.apply("r1", [FileChange("link.py", BOM_CRLF, b"1"), FileChange("b.py", BOM_CRLF, b"2")])
    assert (root / "a.py").read_bytes() == before
    checkpoints.apply("r1", [FileChange("link.py", BOM_CRLF, b"through the link")])
    assert (root / "link.py").is_symlink()
    assert (root / "b.py").read_bytes() == b"through the link"
    checkpoints.undo()
    assert (root / "link.py").is_symlink()
    assert (root / "b.py").read_bytes() == BOM_CRLF


@pytest.mark.parametrize("by_editor", [False, True])
def test_protected_files_are_written_neither_by_name_nor_through_a_link(
    root: Path, tmp_path: Path, by_editor: bool
) -> None:
    (root / "tests").mkdir()
    (root / "tests/helper.py").write_bytes(b"1")
    (root / "link.py").symlink_to("tests/helper.py")
    (root / "folder").symlink_to("tests")
    checkpoints = Checkpoints(root, tmp_path / "other-state", protected={"tests/helper.py", "link-to-b.py"})
    (root / "link-to-b.py").symlink_to("b.py")
    before = picture(root)
    checkpoints.begin("r1", Workspace(root))
    for path in ("tests/helper.py", "link.py", "folder/helper.py", "link-to-b.py"):
        content = BOM_CRLF if path == "link-to-b.py" else b"1"
        changes = [FileChange("bin", before["bin"][1], b"2"), FileChange(path, content, b"2")]
        with pytest.raises(UserError, match="belongs to the tests"):
            checkpoints.apply("r1", changes, skip=[path] if by_editor else [])
    assert picture(root) == before


@pytest.mark.parametrize("name", ["with space.py", "ünï/çode.py", "new\nline.py", 'quo"te\\.py', os.fsdecode(b"b\xff")])
def test_weird_names(root: Path, checkpoints: Checkpoints, name: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"1")
    run(checkpoints, "r1", (name, b"2"), ("n" * 250, b"long"))
    assert (root / name).read_bytes() == b"2"
    checkpoints.undo()
    assert (root / name).read_bytes() == b"1"
    assert not (root / ("n" * 250)).exists()


def store_git(checkpoints: Checkpoints, *args: str) -> bytes:
    command = ["git", "--git-dir", str(checkpoints.folder / "store"), *args]
    return subprocess.run(command, check=True, capture_output=True).stdout


def test_the_snapshot_covers_tracked_untracked_and_unsaved_raw_bytes(root: Path, checkpoints: Checkpoints) -> None:
    def git(*args: str) -> None:
        subprocess.run(["git", *args], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    evil = root.parent / "evil"
    evil.write_text(f"#!/bin/sh\ntouch {root.parent}/owned\ntr a-z A-Z\n")
    evil.chmod(0o755)
    for key in ("filter.x.clean", "filter.x.smudge", "core.fsmonitor", "diff.external"):
        git("config", key, str(evil))
    git("config", "core.autocrlf", "true")
    git("config", "core.hooksPath", str(root.parent))
    (root / ".gitattributes").write_text("* text eol=lf filter=x ident\n*.u16 working-tree-encoding=UTF-16\n")
    (root / ".gitignore").write_text("secret\n")
    (root / "secret").write_text("s")
    (root / "id.txt").write_bytes(b"$Id$\r\n")
    (root / "t.u16").write_bytes(b"\xff\xfet\0")
    (root / "nested").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=root / "nested", check=True)
    (root / "nested/n.py").write_bytes(b"n")
    (root / "link").symlink_to("a.py")
    workspace = Workspace(root, {"a.py": b"unsaved\r\n", "fresh.py": b"never saved"})
    for run_id in ("r1", "r2"):
        checkpoints.begin(run_id, workspace)
        listed = store_git(checkpoints, "ls-tree", "-rz", "--name-only", f"refs/runs/{run_id}/base").split(b"\0")
        assert {os.fsdecode(name) for name in listed if name} == set(workspace.files())
        for path in workspace.files():
            stored = store_git(checkpoints, "cat-file", "blob", f"refs/runs/{run_id}/base:{path}")
            assert stored == (b"a.py" if path == "link" else workspace.read(path))
    (root / "b.py").unlink()
    (root / "link").unlink()
    (root / "link").mkdir()
    (root / "link/inner.py").write_bytes(b"i")
    checkpoints.begin("r3", Workspace(root))
    names = store_git(checkpoints, "ls-tree", "-r", "--name-only", "refs/runs/r3/base").decode().split()
    assert "b.py" not in names
    assert "link/inner.py" in names
    assert "fresh.py" not in names
    assert not (root.parent / "owned").exists()


def test_a_damaged_index_or_journal_entry_does_not_stand_in_the_way(root: Path, checkpoints: Checkpoints) -> None:
    run(checkpoints, "r1", ("a.py", b"x"))
    (checkpoints.folder / "store/index").write_bytes(b"garbage")
    (checkpoints.folder / "store/index.lock").write_bytes(b"")
    (checkpoints.folder / "runs/broken.json").write_bytes(b"{")
    run(checkpoints, "r2", ("a.py", b"y"))
    checkpoints.undo()
    checkpoints.undo()
    assert (root / "a.py").read_bytes() == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"


def test_the_state_is_private(root: Path, checkpoints: Checkpoints) -> None:
    run(checkpoints, "r1", ("a.py", b"x"))
    assert checkpoints.folder.stat().st_mode & 0o777 == 0o700
    assert (checkpoints.folder / "store").stat().st_mode & 0o777 == 0o700


def users_git(root: Path) -> dict[str, str]:
    """Every file of the user's repository, hashed."""
    return {
        str(place.relative_to(root)): hashlib.sha256(place.read_bytes()).hexdigest()
        for place in (root / ".git").rglob("*")
        if place.is_file()
    }


def test_the_users_repository_stays_byte_identical(root: Path, checkpoints: Checkpoints) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "1"]):
        subprocess.run(["git", *identity, *command], cwd=root, check=True)
    (root / "a.py").write_bytes(b"stashed\n")
    subprocess.run(["git", *identity, "stash", "-q"], cwd=root, check=True)
    (root / "staged").write_bytes(b"s")
    subprocess.run(["git", "add", "staged"], cwd=root, check=True)
    before = users_git(root)
    run(checkpoints, "r1", ("a.py", b"x"), ("staged", None))
    checkpoints.undo()
    checkpoints.recover()
    assert users_git(root) == before


def test_the_editor_writes_what_is_skipped(root: Path, checkpoints: Checkpoints) -> None:
    overlay = {"a.py": b"buffer\n"}
    checkpoints.begin("r1", Workspace(root, overlay))
    changes = [FileChange("a.py", b"buffer\n", b"fixed\n"), FileChange("bin", b"\0\xff\0", b"fixed")]
    checkpoints.apply("r1", changes, skip=["a.py"])
    assert (root / "a.py").read_bytes() == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"
    assert (root / "bin").read_bytes() == b"fixed"
    assert statuses(checkpoints) == {"r1": "awaiting_editor"}
    checkpoints.mark_applied_by_editor("r1")
    assert statuses(checkpoints) == {"r1": "applied"}
    now = {"a.py": b"fixed\nand typed on\n"}
    plan = checkpoints.plan_undo(overlay={"a.py": b"fixed\n"})
    assert plan == [FileChange("a.py", b"fixed\n", b"buffer\n"), FileChange("bin", b"fixed", b"\0\xff\0")]
    with pytest.raises(UserError, match=r"a\.py"):
        checkpoints.undo(skip=["a.py"], overlay=now)
    result = checkpoints.undo(skip=["a.py"], overlay={"a.py": b"fixed\n"})
    assert (root / "bin").read_bytes() == b"\0\xff\0"
    assert result.changes == tuple(plan)
    assert statuses(checkpoints) == {"r1": "undone", "undo-1-r1": "awaiting_editor"}
    checkpoints.mark_applied_by_editor(result.undo_id)
    assert statuses(checkpoints) == {"r1": "undone", "undo-1-r1": "applied"}


def test_an_edit_that_the_editor_refused_is_undone_without_it(root: Path, checkpoints: Checkpoints) -> None:
    before = picture(root)
    run(checkpoints, "r1", ("a.py", b"never arrived"), ("bin", b"written"), skip=("a.py",))
    assert [change.path for change in checkpoints.undo("r1").changes] == ["bin"]
    assert picture(root) == before


def test_unknown_and_repeated_runs(root: Path, checkpoints: Checkpoints) -> None:
    for run_id in ("nope", "../../etc", "", "a..b", "x.lock", "-x", "a" * 200):
        with pytest.raises(UserError) as caught:
            checkpoints.undo(run_id)
        assert caught.value.exit_code == ExitCode.USAGE
        if run_id != "nope":
            with pytest.raises(UserError):
                checkpoints.begin(run_id, Workspace(root))
    run(checkpoints, "r1", ("a.py", b"x"))
    with pytest.raises(UserError, match="exists already"):
        checkpoints.begin("r1", Workspace(root))
    with pytest.raises(UserError, match="already been applied"):
        checkpoints.apply("r1", [])
    checkpoints.undo("r1")
    with pytest.raises(UserError, match="nothing to undo"):
        checkpoints.undo("r1")


class PowerCut(BaseException):
    """Stands for a kill: no handler of ours may run after it."""


def counted_failures(
    monkeypatch: pytest.MonkeyPatch, failure: Callable[[], BaseException], at: int
) -> Callable[[], int]:
    """Make the `at`-th step that touches the disk fail; returns how many steps there were."""
    steps = 0

    def wrap(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def step(*args: object, **kwargs: object) -> object:
            nonlocal steps
            steps += 1
            if steps == at:
                raise failure()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    wrap(os, "fsync")
    wrap(Path, "replace")
    wrap(Path, "unlink")
    wrap(Path, "mkdir")
    wrap(Path, "write_bytes")
    wrap(transaction, "open_private")
    wrap(files, "open_private")
    wrap(checkpoints_module.ObjectStore, "_git")
    return lambda: steps


EDITS = (("a.py", b"new a"), ("b.py", None), ("bin", b"new bin"), ("made/n.py", b"n"))


def disk_full() -> BaseException:
    return OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["apply", "undo"])
def test_a_full_disk_at_any_step_changes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    original = picture(root)
    failed_at_least_once = 0
    for at in range(1, 200, 1 if what == "apply" else 3):
        checkpoints = Checkpoints(root, tmp_path / f"state{at}")
        if what == "apply":
            checkpoints.begin("r1", Workspace(root))
            changes = [FileChange(path, files.read_or_none(root / path), after) for path, after in EDITS]
        else:
            run(checkpoints, "r1", *EDITS)
        before = picture(root)
        steps = counted_failures(monkeypatch, disk_full, at)
        try:
            if what == "apply":
                checkpoints.apply("r1", changes)
            else:
                checkpoints.undo("r1")
            failed = False
        except UserError as error:
            assert "No space left" in str(error)
            failed = True
        total = steps()
        monkeypatch.undo()
        if failed:
            failed_at_least_once += 1
            assert picture(root) == before, f"step {at}"
            checkpoints.recover()
            assert picture(root) == before, f"step {at}"
        if what == "apply" and not failed:
            assert picture(root) != before
            checkpoints.undo("r1")
        elif what == "undo" and failed:
            checkpoints.undo("r1")
        assert picture(root) == original, f"step {at}"
        if total < at:
            break
    assert failed_at_least_once > 8
    assert total < at


@pytest.mark.parametrize("what", ["apply", "undo"])
def test_a_power_cut_at_any_step_recovers_to_all_or_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    original = picture(root)
    outcomes = set()
    for at in range(1, 200, 1 if what == "apply" else 3):
        checkpoints = Checkpoints(root, tmp_path / f"state{at}")
        monkeypatch.setattr(Checkpoints, "_mend_quietly", lambda self, record: None)
        if what == "apply":
            checkpoints.begin("r1", Workspace(root))
            changes = [FileChange(path, files.read_or_none(root / path), after) for path, after in EDITS]
        else:
            run(checkpoints, "r1", *EDITS)
        before = picture(root)
        steps = counted_failures(monkeypatch, PowerCut, at)
        try:
            if what == "apply":
                checkpoints.apply("r1", changes)
            else:
                checkpoints.undo("r1")
        except PowerCut:
            pass
        total = steps()
        monkeypatch.undo()
        # The user goes on working before anything recovers.
        user_edits = at % 3 == 0 and (root / "a.py").read_bytes() in (b"new a", before["a.py"][1])
        if user_edits:
            (root / "a.py").write_bytes(b"typed since")
        messages = Checkpoints(root, tmp_path / f"state{at}").recover()
        now = picture(root)
        if user_edits:
            assert now["a.py"][1] == b"typed since"
            if messages:
                assert "a.py, edited since" in messages[0]
        else:
            outcomes.add("before" if now == before else "after")
            assert now == before or (not messages and total < at + 4), f"step {at}"
            if messages:
                assert "taken back" in messages[0]
                assert now == before
        assert not [path for path in now if ".lsp-agent" in path]
        for path, (mode, content) in original.items():
            (root / path).write_bytes(content)
            (root / path).chmod(mode)
        (root / "made/n.py").unlink(missing_ok=True)
        if (root / "made").exists():
            (root / "made").rmdir()
        if total < at:
            break
    assert outcomes == {"before", "after"}


def test_an_interrupted_run_can_still_be_undone(
    root: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"".join(b"%d\n" % number for number in range(1, 10))
    monkeypatch.setattr(Checkpoints, "_mend_quietly", lambda self, record: None)
    monkeypatch.setattr(checkpoints_module.Journal, "commit", lambda self, record: (_ for _ in ()).throw(PowerCut()))
    with pytest.raises(PowerCut):
        run(checkpoints, "r1", ("a.py", lines.replace(b"2", b"two")), ("bin", b"x"))
    monkeypatch.undo()
    (root / "a.py").write_bytes(lines.replace(b"2", b"two").replace(b"9", b"nine"))
    (message,) = checkpoints.recover()
    assert "except in a.py" in message
    assert (root / "bin").read_bytes() == b"\0\xff\0"
    assert statuses(checkpoints) == {"r1": "interrupted"}
    checkpoints.undo()
    assert (root / "a.py").read_bytes() == lines.replace(b"9", b"nine")


def test_several_threads_and_handles_at_once(root: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        own = Checkpoints(root, tmp_path / "state")
        try:
            for turn in range(3):
                run(own, f"t{number}-{turn}", (f"file{number}", b"%d" % turn))
                if turn == 1:
                    own.undo(f"t{number}-{turn}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [(root / f"file{number}").read_bytes() for number in range(4)] == [b"2"] * 4
    assert len(checkpoints.runs()) == 4 * 4


def test_old_runs_are_forgotten_and_the_rest_stays_undoable(
    root: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints_module, "_KEPT_RUNS", 2)
    for number in range(55):
        checkpoints.begin(f"idle{number}", Workspace(root))
    run(checkpoints, "r1", ("a.py", b"x"))
    assert len(checkpoints.runs()) < 55
    checkpoints.undo("r1")
    assert (root / "a.py").read_bytes() == b"1\n2\n3\n4\n5\n6\n7\n8\n9\n"


def test_the_root_is_found_from_a_folder_in_it(root: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    (root / "pkg").mkdir()
    assert find_root(root / "pkg", tmp_path / "state") == root / "pkg"
    run(checkpoints, "r1", ("a.py", b"x"))
    assert find_root(root / "pkg", tmp_path / "state") == root
