"""The watcher: reports what belongs, in groups, and outlives what happens to the folder."""

from __future__ import annotations

import errno
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lsp_agent.workspace import watcher as watcher_module
from lsp_agent.workspace.watcher import Watcher


class Reports:
    """What a watcher reported."""

    def __init__(self) -> None:
        self.groups: list[set[str]] = []
        self.failing = False

    def __call__(self, paths: set[str]) -> None:
        self.groups.append(paths)
        if self.failing:
            raise RuntimeError("a fault of the caller's")

    @property
    def paths(self) -> set[str]:
        return set().union(*self.groups)

    def wait_for(self, *paths: str) -> None:
        eventually(lambda: set(paths) <= self.paths, lambda: f"{paths} not in {self.groups}")


def eventually(condition: Callable[[], bool], message: Callable[[], str], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message()
        time.sleep(0.02)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "pkg").mkdir(parents=True)
    (folder / "pkg/a.py").write_text("1")
    (folder / ".gitignore").write_text("*.log\nbuild/\n")
    (folder / "build").mkdir()
    return folder


@pytest.fixture
def reports(root: Path) -> Iterator[Reports]:
    reports = Reports()
    watcher = Watcher(root, reports, debounce_s=0.1)
    watcher.start()
    yield reports
    watcher.stop()
    watcher.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "workspace-watcher"]


def test_a_group_of_changes_is_one_report(root: Path, reports: Reports) -> None:
    for number in range(20):
        (root / f"f{number}.py").write_text("x")
    (root / "pkg/a.py").write_text("2")
    reports.wait_for("f19.py", "pkg/a.py")
    assert len(reports.groups) <= 3
    assert reports.paths == {"pkg/a.py", *(f"f{number}.py" for number in range(20))}
    reports.groups.clear()
    (root / "pkg/a.py").unlink()
    (root / "f1.py").rename(root / "moved.py")
    reports.wait_for("pkg/a.py", "f1.py", "moved.py")


LIMITED = """
import logging, sys, time
from pathlib import Path
from lsp_agent.workspace import watcher
watcher._POLL_S = 0.1
logging.basicConfig(stream=sys.stdout)
root, limit, value = Path(sys.argv[1]), Path("/proc/sys/user", sys.argv[2]), sys.argv[3]
for number in range(20):
    (root / f"d{number}").mkdir()
limit.write_text(value)
seen = set()
watch = watcher.Watcher(root, seen.update, debounce_s=0.05)
watch.start()
for number in range(20):
    (root / f"new{number}").mkdir()
end = time.monotonic() + 30
while "new19/x.py" not in seen and time.monotonic() < end:
    time.sleep(0.2)
    (root / "new19/x.py").write_text(str(time.monotonic()))
watch.stop()
print(sorted(seen))
"""


@pytest.mark.parametrize(("name", "value"), [("watches", "5"), ("watches", "30"), ("instances", "0")])
def test_the_kernels_limits(root: Path, name: str, value: str) -> None:
    namespace = ["unshare", "--user", "--map-root-user"]
    limit = f"max_inotify_{name}"
    if not shutil.which("unshare") or subprocess.run([*namespace, "test", "-w", f"/proc/sys/user/{limit}"]).returncode:
        pytest.skip("needs user namespaces, whose limits can be set without touching the machine's")
    command = [*namespace, sys.executable, "-c", LIMITED, str(root), limit, value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "new19/x.py" in done.stdout, done
    assert done.stdout.count("max_user_watches") == 1


@pytest.mark.parametrize("in_git", [True, False])
def test_ignored_files_are_not_reported_and_reading_is_no_change(root: Path, reports: Reports, in_git: bool) -> None:
    if in_git:
        subprocess.run(["git", "init", "-q"], cwd=root, check=True)
        subprocess.run(["git", "add", "."], cwd=root, check=True)
    (root / "x.log").write_text("")
    (root / "build/out.py").write_text("")
    (root / "__pycache__").mkdir()
    (root / "__pycache__/a.pyc").write_text("")
    (root / ".lsp-agent-1-0.tmp").write_text("")
    (root / "pkg/a.py").read_text()
    (root / "last.py").write_text("")
    reports.wait_for("last.py")
    assert reports.paths == {"last.py"}


def test_folders_that_move_stand_for_their_files(root: Path, reports: Reports, tmp_path: Path) -> None:
    (tmp_path / "outside/deep").mkdir(parents=True)
    (tmp_path / "outside/deep/n.py").write_text("")
    (tmp_path / "outside").rename(root / "arrived")
    reports.wait_for("arrived/deep/n.py")
    (root / "pkg").rename(tmp_path / "left")
    reports.wait_for("pkg/a.py")
    (root / "arrived/late.py").write_text("")
    reports.wait_for("arrived/late.py")
    reports.groups.clear()
    shutil.rmtree(root / "arrived")
    reports.wait_for("arrived/deep/n.py", "arrived/late.py")
    assert not {"pkg", "arrived", "arrived/deep"} & reports.paths


def test_a_steady_stream_is_reported_in_time(root: Path, reports: Reports) -> None:
    end = time.monotonic() + 30
    while not reports.groups and time.monotonic() < end:
        (root / "pkg/a.py").write_text(str(time.monotonic()))
        time.sleep(0.01)
    assert reports.groups


def test_a_failing_callback_does_not_end_the_watch(
    root: Path, reports: Reports, caplog: pytest.LogCaptureFixture
) -> None:
    reports.failing = True
    (root / "one.py").write_text("")
    reports.wait_for("one.py")
    (root / "two.py").write_text("")
    reports.wait_for("two.py")
    eventually(lambda: "could not be reported" in caplog.text, lambda: caplog.text)


def test_the_root_may_vanish_and_come_back(root: Path, reports: Reports) -> None:
    shutil.rmtree(root)
    reports.wait_for("pkg/a.py")
    time.sleep(1.2)
    reports.groups.clear()
    root.mkdir()
    (root / "new.py").write_text("")
    reports.wait_for("new.py")
    reports.groups.clear()
    (root / "newer.py").write_text("")
    reports.wait_for("newer.py")


def test_polling_takes_over_at_the_limit_of_watches(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Exhausted(watcher_module.Observer):  # type: ignore[misc, valid-type]
        def start(self) -> None:
            raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(watcher_module, "Observer", Exhausted)
    monkeypatch.setattr(watcher_module, "_POLL_S", 0.1)
    reports = Reports()
    watcher = Watcher(root, reports, debounce_s=0.05)
    with caplog.at_level(logging.WARNING):
        watcher.start()
    try:
        assert "max_user_watches" in caplog.text
        (root / "polled.py").write_text("")
        (root / "x.log").write_text("")
        reports.wait_for("polled.py")
        shutil.rmtree(root)
        reports.wait_for("pkg/a.py")
        assert "x.log" not in reports.paths
    finally:
        watcher.stop()
