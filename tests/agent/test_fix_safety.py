"""What `fix` must never do: claim too much, touch the user's tree, change tests, outlive its limits or a cancel."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import BUGGY, TEST, FakeModel, Project
from test_fix_stages import FIXED, TARGET, only

from lsp_agent.agent import events
from lsp_agent.agent.fix import fix
from lsp_agent.agent.localise import Suspect
from lsp_agent.agent.regions import Region
from lsp_agent.agent.request import FixRequest, Limits
from lsp_agent.cancel import CancelToken
from lsp_agent.errors import Cancelled, ExitCode, UserError
from lsp_agent.workspace.workspace import Workspace

RIGHT = only("total == limit", "total <= limit")


def verdicts(project: Project) -> list[str]:
    return [e.verdict for e in project.events if isinstance(e, events.CandidateJudged)]


def test_nothing_failing_needs_no_model(calc: Project) -> None:
    calc.write(calc_py=FIXED)

    def no_model(name: str | None, cancel: CancelToken) -> FakeModel:
        raise UserError("No model is installed.")

    result = fix(FixRequest(), Workspace(calc.root), calc.runner, no_model, calc.events.append, CancelToken())
    assert result.status == "nothing_failing" and result.turns == 0


def test_no_model_is_an_environment_error(calc: Project) -> None:
    def no_model(name: str | None, cancel: CancelToken) -> FakeModel:
        raise UserError("No model is installed.")

    with pytest.raises(UserError, match="No model") as raised:
        fix(FixRequest(), Workspace(calc.root), calc.runner, no_model, calc.events.append, CancelToken())
    assert raised.value.exit_code == ExitCode.ENVIRONMENT


def test_no_tests(project: Project) -> None:
    project.write(calc_py=BUGGY)
    with pytest.raises(UserError, match="No tests") as raised:
        project.fix()
    assert raised.value.exit_code == ExitCode.ENVIRONMENT


def test_unknown_test_is_wrong_usage(calc: Project) -> None:
    with pytest.raises(UserError, match=r"does not exist: test_calc\.py::test_nowhere") as raised:
        calc.fix("test_calc.py::test_nowhere")
    assert raised.value.exit_code == ExitCode.USAGE


def test_flaky_test_is_not_claimed(calc: Project) -> None:
    mark = calc.root.parent / "ran"
    calc.write(
        calc_py=FIXED,
        test_flaky_py=f"from pathlib import Path\n\n\ndef test_flaky():\n    mark = Path({str(mark)!r})\n"
        "    before = mark.exists()\n    mark.touch()\n    assert before\n",
    )
    calc.model.infills = RIGHT
    result = calc.fix()
    assert result.status == "flaky" and result.flaky == ("test_flaky.py::test_flaky",) and result.fixed == ()
    assert result.turns == 0


def test_breaking_another_test_is_refused(calc: Project) -> None:
    calc.model.infills = only("total == limit", "True")  # test_below passes, test_above does not
    result = calc.fix(max_turns=80)
    assert result.status == "not_green" and result.changes == ()
    assert "breaks others" in verdicts(calc)


def test_broken_and_repeated_candidates_cost_no_test_run(calc: Project) -> None:
    answers = iter(["total = = limit", "unknown_name <= limit", "total == limit", "limit == total", "limit == total"])
    calc.model.infills = lambda p: next(answers, "total == limit") if "if <FILL>:" in p else ""
    calc.fix(max_turns=60)
    seen = verdicts(calc)
    assert any("does not parse" in v for v in seen)
    assert any("undefined name 'unknown_name'" in v for v in seen)
    assert "refused: no change" in seen and "refused: tried before" in seen


@pytest.mark.parametrize("path", ["test_calc.py", "conftest.py", "tests/helper.py", "pytest.ini"])
def test_tests_cannot_be_changed(calc: Project, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Even a search that proposes an edit of a protected file gets nowhere."""
    calc.write(**{path.replace("/", "__"): TEST if path == "test_calc.py" else "X = 1\n"})
    suspect = Suspect(Region(path, "<module>", 1, 20), 1.0)
    monkeypatch.setattr("lsp_agent.agent.fix.localise", lambda *a, **k: [suspect])
    calc.model.infills = calc.model.chats = lambda p: "X = 2"
    result = calc.fix(max_turns=30)
    assert result.status == "not_green" and result.best == ()
    assert all("read-only" in v or "no usable" in v for v in verdicts(calc)) and verdicts(calc)


def test_protected_files_are_never_suspects(calc: Project) -> None:
    calc.write(conftest_py="import calc\n", tests__helper_py="def below():\n    pass\n")
    calc.fix(max_turns=1)
    started = next(e for e in calc.events if isinstance(e, events.TargetStarted))
    assert {s.partition(":")[0] for s in started.suspects} == {"calc.py"}


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"max_turns": 5}, "5 turns"), ({"max_tokens": 40}, "40 tokens"), ({"max_seconds": 0.5}, "seconds")],
)
def test_limits(calc: Project, limits: dict[str, float], reason: str) -> None:
    calc.model.infills = lambda p: time.sleep(0.02) or ""
    result = calc.fix(**limits)
    assert result.status == "not_green" and reason in result.reason
    assert result.turns <= limits.get("max_turns", 400) and result.seconds < 5


def test_one_slow_answer_cannot_outlast_the_limit(calc: Project) -> None:
    def wait(cancel: CancelToken) -> None:
        if cancel.wait(30):
            raise Cancelled

    calc.model.on_ask = wait
    result = calc.fix(max_seconds=1)
    assert result.status == "not_green" and result.seconds < 5


@pytest.mark.parametrize("phase", ["loading", "baseline", "asking", "testing", "proving"])
def test_cancel_in_every_phase(calc: Project, phase: str) -> None:
    calc.model.infills = RIGHT

    def open_model(name: str | None, cancel: CancelToken) -> FakeModel:
        if phase == "loading":
            calc.cancel.cancel()
            assert cancel.wait(10), "loading sees the cancel"
            raise Cancelled
        return calc.model

    def before_run(tree: Path) -> None:
        runs = len(calc.runner.runs)
        if (phase == "baseline" and runs == 0) or (phase == "testing" and runs == 2):
            calc.cancel.cancel()

    def on_event(event: events.Event) -> None:
        if phase == "proving" and isinstance(event, events.Verifying):
            calc.cancel.cancel()

    calc.runner.before_run = before_run
    if phase == "asking":
        calc.model.on_ask = lambda cancel: calc.cancel.cancel()
    before = calc.tree()
    with pytest.raises(Cancelled):
        fix(FixRequest(), Workspace(calc.root), calc.runner, open_model, on_event, calc.cancel)
    assert calc.tree() == before
    assert calc.model.closed == (0 if phase == "loading" else 1)


def test_user_edits_another_file_meanwhile(calc: Project) -> None:
    calc.user_edits = True
    calc.write(other_py="A = 1\n")
    calc.model.infills = RIGHT
    calc.model.on_ask = lambda cancel: calc.write(other_py="A = 2\n") and None
    seen: list[str] = []
    calc.runner.before_run = lambda tree: seen.append((tree / "other.py").read_text())
    result = calc.fix()
    assert result.status == "green"
    assert seen[-1] == "A = 2\n", "the proof ran on the tree as it is now"


def test_user_edits_the_same_file_elsewhere_meanwhile(calc: Project) -> None:
    calc.user_edits = True
    calc.model.infills = RIGHT
    edited = BUGGY + "\n\nEXTRA = 1\n"
    calc.model.on_ask = lambda cancel: calc.write(calc_py=edited) and None
    result = calc.fix()
    assert result.status == "green"
    assert result.changes[0].before == edited.encode()
    assert result.changes[0].after == edited.replace("total ==", "total <=").encode()


def test_user_edits_the_same_line_meanwhile(calc: Project) -> None:
    calc.user_edits = True
    calc.model.infills = RIGHT
    calc.model.on_ask = lambda cancel: calc.write(calc_py=BUGGY.replace("total ==", "limit ==")) and None
    result = calc.fix()
    assert result.status == "not_green" and result.changes == () and "edited" in result.reason


def test_user_breaks_a_test_while_the_proof_runs(calc: Project) -> None:
    """The tree changes during the proof: it is done again, on the new tree, and says no."""
    calc.user_edits = True
    calc.model.infills = RIGHT
    proofs: list[str] = []

    def before_run(tree: Path) -> None:
        if any(isinstance(e, events.Verifying) for e in calc.events):
            proofs.append((tree / "test_calc.py").read_text())
            calc.write(test_calc_py=TEST.replace("is False", "is None"))

    calc.runner.before_run = before_run
    result = calc.fix()
    assert len(proofs) == 2 and "is None" in proofs[1]
    assert result.status == "not_green" and result.changes == () and "test_above" in result.reason


def test_record_is_private_and_complete(calc: Project) -> None:
    calc.model.infills = RIGHT
    result = calc.fix()
    assert result.trajectory is not None
    assert stat.S_IMODE(result.trajectory.stat().st_mode) == 0o600
    assert stat.S_IMODE(result.trajectory.parent.stat().st_mode) == 0o700
    records = [json.loads(line) for line in result.trajectory.read_text().splitlines()]
    kinds = [r["kind"] for r in records]
    assert kinds[0] == "run" and kinds[-1] == "result"
    assert {"baseline", "second look", "target", "score", "ask", "judged", "progress", "proof"} <= set(kinds)
    ask = next(r for r in records if r["kind"] == "ask")
    assert {"turn", "stage", "prefix", "suffix", "answers", "usage", "seconds"} <= ask.keys()
    assert records[-1]["status"] == "green"


def test_record_survives_a_kill(calc: Project) -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from conftest import FakeModel\n"
        "from quick_runner import QuickRunner\n"
        "from lsp_agent.agent.fix import fix\n"
        "from lsp_agent.agent.request import FixRequest\n"
        "from lsp_agent.cancel import CancelToken\n"
        "from lsp_agent.workspace.workspace import Workspace\n"
        "root = Path(sys.argv[1])\n"
        "model = FakeModel(infills=lambda p: '')\n"
        "def on_ask(cancel):\n"
        "    print(len(model.asked), flush=True)\n"
        "    time.sleep(60 if len(model.asked) == 4 else 0)\n"
        "model.on_ask = on_ask\n"
        "fix(FixRequest(), Workspace(root), QuickRunner(root), lambda *_: model, lambda e: None, CancelToken())\n"
    )
    before = calc.tree()
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(calc.root), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == b"4":
            os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (record,) = (Path(os.environ["LSP_AGENT_STATE_DIR"]) / "runs").glob("*.jsonl")
    records = [json.loads(line) for line in record.read_text().splitlines()]
    assert [r["turn"] for r in records if r["kind"] == "ask"] == [1, 2, 3]
    assert calc.tree() == before


def test_scratch_copies_are_removed(calc: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path / "cache"))
    calc.model.infills = RIGHT
    assert calc.fix().status == "green"
    assert not list((tmp_path / "cache" / "scratch").rglob("calc.py"))


def test_model_loads_while_the_tests_run(calc: Project) -> None:
    started = threading.Event()
    overlapped: list[bool] = []

    def open_model(name: str | None, cancel: CancelToken) -> FakeModel:
        started.set()
        return calc.model

    calc.runner.before_run = lambda tree: overlapped.append(started.wait(5))
    calc.model.infills = RIGHT
    request = FixRequest(limits=Limits(max_seconds=30))
    result = fix(request, Workspace(calc.root), calc.runner, open_model, calc.events.append, CancelToken())
    assert result.status == "green" and overlapped[0]
    assert result.fixed == (TARGET,)
