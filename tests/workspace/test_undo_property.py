"""Whatever runs, edits and undos come in whatever order: no line that the user typed is ever lost."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lsp_agent.errors import ExitCode, UserError
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.checkpoints import Checkpoints
from lsp_agent.workspace.workspace import Workspace

LINES = 12
position = st.integers(min_value=0, max_value=LINES - 1)


class Session(RuleBasedStateMachine):
    """One file, edited by runs (each replaces lines) and by the user (who inserts and replaces lines)."""

    @initialize(ending=st.sampled_from([b"\n", b"\r\n"]), final=st.booleans(), bom=st.booleans())
    def start(self, ending: bytes, final: bool, bom: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name, "project")
        self.root.mkdir()
        self.file = self.root / "f.py"
        self.ending = ending
        start = b"\xef\xbb\xbf" if bom else b""
        self.file.write_bytes(start + ending.join(b"line %d" % n for n in range(LINES)) + (ending if final else b""))
        self.original = self.file.read_bytes()
        self.checkpoints = Checkpoints(self.root, Path(self.folder.name, "state"))
        self.runs: list[str] = []
        self.typed: set[bytes] = set()
        self.number = 0

    def lines(self) -> list[bytes]:
        return self.file.read_bytes().split(self.ending)

    @rule(at=position, count=st.integers(min_value=1, max_value=3))
    def run(self, at: int, count: int) -> None:
        self.number += 1
        run_id = f"r{self.number}"
        lines = self.lines()
        for index in range(at, min(at + count, len(lines))):
            if not any(mark in lines[index] for mark in self.typed):
                lines[index] = b"%s at %d" % (run_id.encode(), index)
        self.checkpoints.begin(run_id, Workspace(self.root))
        change = FileChange("f.py", self.file.read_bytes(), self.ending.join(lines))
        self.checkpoints.apply(run_id, [change, FileChange(f"{run_id}.py", None, b"made")])
        self.runs.append(run_id)

    @rule(at=position, insert=st.booleans())
    def type(self, at: int, insert: bool) -> None:
        self.number += 1
        mark = b"typed<%d>" % self.number
        lines = self.lines()
        at = min(at, len(lines) - 1)
        if insert or any(other in lines[at] for other in self.typed):
            lines.insert(at, mark)
        else:
            lines[at] = mark
        self.typed.add(mark)
        self.file.write_bytes(self.ending.join(lines))

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(self.runs))
        before = {place.name: place.read_bytes() for place in self.root.iterdir()}
        try:
            result = self.checkpoints.undo(run_id)
        except UserError as error:
            assert error.exit_code == ExitCode.NOT_GREEN
            assert {place.name: place.read_bytes() for place in self.root.iterdir()} == before
            return
        assert result.run_id == run_id
        self.runs.remove(run_id)
        assert b"%s at" % run_id.encode() not in self.file.read_bytes()
        assert not (self.root / f"{run_id}.py").exists()
        if not self.runs and not self.typed:
            assert self.file.read_bytes() == self.original

    @precondition(lambda self: self.number)
    @invariant()
    def no_typed_line_is_lost(self) -> None:
        text = self.file.read_bytes()
        assert all(mark in text for mark in self.typed)
        assert {place.name for place in self.root.iterdir()} == {"f.py", *(f"{run_id}.py" for run_id in self.runs)}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


Session.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestSession = Session.TestCase
