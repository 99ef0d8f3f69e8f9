"""The loop: run the tests, suspect, ask, gate, test, keep the best; then prove it on the user's own tree.

Nothing here writes to the user's tree: candidates live in scratch copies, and the caller applies the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lsp_agent.agent import events
from lsp_agent.agent.asking import Asking
from lsp_agent.agent.attempts import Attempts
from lsp_agent.agent.budget import Budget, BudgetSpent
from lsp_agent.agent.candidates import Ask
from lsp_agent.agent.gates import Gates
from lsp_agent.agent.judge import LAST_TIMEOUT_S, Judge, Verdict, passes
from lsp_agent.agent.loading import Loading
from lsp_agent.agent.localise import Suspect, localise
from lsp_agent.agent.minimise import minimise
from lsp_agent.agent.prompts import Problem, problem
from lsp_agent.agent.proof import Proof, baseline, proof_timeout, prove, second_look, targets
from lsp_agent.agent.request import FixRequest, FixResult, OpenModel, Status
from lsp_agent.agent.search import Search
from lsp_agent.agent.source import Source
from lsp_agent.agent.trajectory import Trajectory
from lsp_agent.agent.tree import Originals
from lsp_agent.cancel import CancelToken
from lsp_agent.testing.results import TestResult, TestRun, newly_bad
from lsp_agent.testing.runner import Runner
from lsp_agent.workspace.revision import revision
from lsp_agent.workspace.scratch import ScratchTree
from lsp_agent.workspace.workspace import Workspace


def fix(
    request: FixRequest,
    workspace: Workspace,
    runner: Runner,
    open_model: OpenModel,
    on_event: events.OnEvent,
    cancel: CancelToken,
) -> FixResult:
    """Find changes that make the failing tests pass; never touches the user's tree.

    Raises `UserError` when there is nothing to work with (no tests, no model) and `Cancelled`.
    """
    trajectory = Trajectory()
    try:
        asked = {"root": workspace.root, "nodeids": request.nodeids, "model": request.model, "seed": request.seed}
        standing = {"revision": revision(workspace.root), "limits": vars(request.limits)}
        trajectory.write("run", {**asked, **standing})
        with Loading(open_model, request.model, cancel) as loading, ScratchTree(workspace) as scratch:
            run = _Run(request, workspace, runner, scratch, loading, trajectory, on_event, cancel)
            result = run.result()
        trajectory.write("result", {**vars(result), "changes": None, "best": None, "diff": result.diff})
        on_event(events.Finished(result.status, result.turns, result.usage, result.seconds))
        return result
    except BaseException as error:
        trajectory.write("ended", {"error": type(error).__name__, "message": str(error)})
        raise
    finally:
        trajectory.close()


@dataclass
class _State:
    """The best state so far: texts of changed files, and the full test run that was made on them."""

    run: TestRun
    texts: dict[str, str] = field(default_factory=dict)
    solved_by: list[str] = field(default_factory=list)


class _Run:
    """One run of `fix`: the parts it works with, and the best state."""

    def __init__(
        self,
        request: FixRequest,
        workspace: Workspace,
        runner: Runner,
        scratch: ScratchTree,
        loading: Loading,
        trajectory: Trajectory,
        on_event: events.OnEvent,
        cancel: CancelToken,
    ) -> None:
        self.request, self.workspace, self.runner, self.scratch = request, workspace, runner, scratch
        self.loading, self.trajectory, self.on_event, self.cancel = loading, trajectory, on_event, cancel
        self.budget = Budget(request.limits)
        self.originals = Originals(scratch)
        self.gates = Gates()
        self.attempts = Attempts()

    def result(self) -> FixResult:
        """Baseline, search, proof."""
        before = baseline(self.runner, self.scratch, self.request, self.cancel)
        self._record_tests("baseline", before)
        self.on_event(events.BaselineDone(len(before.results), before.failing, before.seconds))
        wanted = targets(before, self.request)
        if not wanted:
            return self._end("nothing_failing", before)
        self.loading.raise_error()  # it will be needed: no need to run more tests first
        test_timeout = self.request.test_timeout_s
        limit = min(test_timeout, max(LAST_TIMEOUT_S, self.budget.seconds_left))
        again = second_look(self.runner, self.scratch, before, wanted, limit, self.cancel)
        self._record_tests("second look", again)
        flaky = tuple(n for n in wanted if passes(again, n))
        wanted = tuple(n for n in wanted if n not in flaky)
        if not wanted:
            return self._end("flaky", before, flaky=flaky)
        model = self.loading.result()
        self.on_event(events.ModelReady(model.name, self.loading.seconds))
        self.budget.reserve_s = min(2 * before.seconds, self.request.limits.max_seconds / 4)
        self.asking = Asking(model, self.budget, self.trajectory, self.on_event, self.cancel)
        left = self.budget
        self.judge = Judge(self.runner, self.scratch, before, test_timeout, lambda: left.seconds_left, self.cancel)
        self.state = _State(before)
        reason = self._solve_all(wanted, again)
        fixed = tuple(n for n in before.failing if n not in flaky and passes(self.state.run, n))
        wanted = self._with_revealed(wanted)
        unsolved = tuple(n for n in wanted if not passes(self.state.run, n))
        changes = self.originals.changes(self.state.texts) or ()
        if unsolved or not changes:
            reason = reason or f"No candidate made {(unsolved or wanted)[0]} pass."
            reason = " ".join((reason, *self.asking.cannot.values()))
            if not changes and self.attempts.verdict is not None:
                return self._end("not_green", before, reason=reason, flaky=flaky, **self._breaking(before, wanted))
            best = changes or self.originals.changes(self.attempts.further) or ()
            return self._end("not_green", before, reason=reason, best=best, fixed=fixed, unsolved=unsolved, flaky=flaky)
        self.on_event(events.Verifying())
        proof = prove(
            self.runner,
            self.workspace,
            changes,
            before,
            fixed,
            lambda: proof_timeout(test_timeout, left.seconds_to_end, before),
            self.cancel,
            self.judge.known_failing,
        )
        self._record_proof(proof)
        if proof.problem:
            more = {"best": proof.changes, "unsolved": wanted, "broken": proof.broken}
            return self._end("not_green", before, reason=proof.problem, flaky=flaky, **more)
        return self._end(
            "green", before, changes=proof.changes, best=proof.changes, fixed=fixed, flaky=flaky, last=proof.run
        )

    def _breaking(self, before: TestRun, wanted: tuple[str, ...]) -> dict[str, Any]:
        """What to report of the best attempt when it makes other tests worse."""
        verdict, best = self.attempts.verdict, self.originals.changes(self.attempts.breaking) or ()
        assert verdict is not None
        # The search may have stopped at the first tests that broke: the report is to name all.
        run = verdict.run or self.judge.full(best, self.budget.seconds_to_end)
        return {
            "best": best,
            "fixed": tuple(n for n in before.failing if passes(run, n)),
            "broken": tuple(dict.fromkeys([*newly_bad(before, run), *verdict.broken])),
            "unsolved": tuple(n for n in wanted if not passes(run, n)),
            "last": run,
        }

    def _solve_all(self, wanted: tuple[str, ...], again: TestRun) -> str:
        """Work on one failing test after the other, keeping progress; returns why it stopped early, if it did."""
        given_up: set[str] = set()
        try:
            while True:
                left = [n for n in self._with_revealed(wanted) if not passes(self.state.run, n) and n not in given_up]
                if not left:
                    return ""
                if not self._solve(left[0], again):
                    given_up.add(left[0])
        except BudgetSpent as spent:
            return f"It stopped because {spent}."

    def _with_revealed(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """A file that can be collected again shows its tests: those that fail are to be mended too."""
        files = {n for n in wanted if "::" not in n}
        return (*wanted, *(n for n in self.state.run.failing if n.partition("::")[0] in files and n not in wanted))

    def _solve(self, target: str, again: TestRun) -> bool:
        """Search from the best state until something is better; returns whether anything is."""
        result = self.state.run.results[target]
        if target in again.results and not self.state.texts:
            result = again.results[target]
        suspects, about = self._localise(result, again)
        self.on_event(events.TargetStarted(target, about.failure, tuple(str(s.region) for s in suspects)))
        shown = [(str(s.region), round(s.score, 3)) for s in suspects]
        self.trajectory.write("target", {"nodeid": target, "failure": about.failure, "suspects": shown})
        search = Search(suspects, about, self.asking.file_tokens, self._read, self.asking.surprise, self.request.seed)
        for ask in search.asks():
            for answer in self.asking.ask(ask):
                self.budget.check()
                if self._try(target, ask, answer, search):
                    return True
        return False

    def _try(self, target: str, ask: Ask, answer: str, search: Search) -> bool:
        """Gate and test one answer; returns whether it became the best state."""
        path = ask.region.path
        text = ask.build(answer)
        if text is None:
            return self._judged(ask, "refused: no usable answer")
        texts = {**self.state.texts, **ask.base, path: text}
        before = ask.base.get(path) or self._text(path)
        refused = self._refused(path, before, texts)
        if refused:
            return self._judged(ask, f"refused: {refused}")
        verdict = self._test(texts, target)
        self._judged(ask, verdict.kind, verdict)
        if verdict.kind == "breaks others":
            self.attempts.keep_breaking(texts, verdict)
        if verdict.kind == "further":
            search.seeds.append((verdict.depth, texts))
            if verdict.run is not None and not self.judge.broken(self.state.run, verdict.run):
                self.attempts.further = texts
        if verdict.run is None or not self._better(verdict):
            return False
        if verdict.kind == "passes":
            texts, verdict = self._smaller(path, texts, verdict, target)
        assert verdict.run is not None
        fixed = tuple(n for n in self.state.run.failing if passes(verdict.run, n))
        self.state = _State(verdict.run, texts, [*self.state.solved_by, ask.stage])
        self.on_event(events.TargetSolved(target, ask.stage, fixed))
        self.trajectory.write("progress", {"stage": ask.stage, "fixed": fixed, "turn": self.budget.turns})
        return True

    def _better(self, verdict: Verdict) -> bool:
        """Whether a full run shows more passing targets than the best state, and nothing worse."""
        assert verdict.run is not None
        newly = [n for n in self.state.run.failing if passes(verdict.run, n)]
        return bool(newly) and not verdict.broken and not self.judge.broken(self.state.run, verdict.run)

    def _smaller(
        self, path: str, texts: dict[str, str], verdict: Verdict, target: str
    ) -> tuple[dict[str, str], Verdict]:
        """The smallest version of a passing change that still passes."""
        best = verdict

        def still_passes(text: str) -> bool:
            nonlocal best
            candidate = {**texts, path: text}
            if self.budget.seconds_left <= 0 or self._refused(path, self._text(path), candidate):
                return False
            tried = self._test(candidate, target)
            if tried.kind == "passes" and tried.run is not None and self._better(tried):
                best = tried
                return True
            return False

        text = minimise(self._text(path), texts[path], still_passes)
        return {**texts, path: text}, best

    def _test(self, texts: dict[str, str], target: str) -> Verdict:
        changes = self.originals.changes(texts)
        if not changes:
            return Verdict("fails", 0.0, 0)
        return self.judge.judge(changes, target, self.state.run)

    def _refused(self, path: str, before: str, texts: dict[str, str]) -> str | None:
        if any(self.runner.is_protected(p) for p in texts):
            return "tests and their configuration are read-only"
        return self.gates.refuse(path, before, texts)

    def _judged(self, ask: Ask, verdict: str, tested: Verdict | None = None) -> bool:
        tests, seconds = (tested.tests_run, tested.seconds) if tested else (0, 0.0)
        self.on_event(events.CandidateJudged(self.budget.turns, ask.stage, ask.where, verdict, tests, seconds))
        more: dict[str, Any] = {"broken": tested.broken} if tested else {}
        record = {"turn": self.budget.turns, "verdict": verdict, "tests": tests, "seconds": round(seconds, 3), **more}
        self.trajectory.write("judged", record)
        return False

    def _localise(self, result: TestResult, again: TestRun) -> tuple[list[Suspect], Problem]:
        test = self.originals.source(result.path)
        about = problem(result, test.text if test is not None else "")
        paths = self.workspace.files()
        return localise(result, again, self._read, paths, self.runner.is_protected, about.test), about

    def _read(self, path: str) -> Source | None:
        """A file in the best state."""
        source = self.originals.source(path)
        if source is not None and path in self.state.texts:
            return Source(path, self.state.texts[path], source.encoding, source.newline, source.bom)
        return source

    def _text(self, path: str) -> str:
        source = self._read(path)
        return source.text if source is not None else ""

    def _record_tests(self, kind: str, run: TestRun) -> None:
        failing = {n: f"{run.results[n].exception}: {run.results[n].message}"[:400] for n in run.failing}
        seconds = round(run.seconds, 3)
        about = {"tests": len(run.results), "failing": failing, "seconds": seconds, "complete": run.complete}
        self.trajectory.write(kind, {**about, "error": run.error})

    def _record_proof(self, proof: Proof) -> None:
        if proof.run is not None:
            self._record_tests("proof", proof.run)
        self.trajectory.write("proven", {"problem": proof.problem})

    def _end(self, status: Status, before: TestRun, **more: Any) -> FixResult:
        last: TestRun | None = more.pop("last", None)
        unsolved = more.pop("unsolved", ())
        fixed = more.get("fixed", ())
        final = last or (self.state.run if hasattr(self, "state") else before)
        wanted = {*targets(before, self.request), *unsolved, *more.get("broken", ())}
        return FixResult(
            status=status,
            still_failing=tuple(n for n in unsolved if n not in fixed),
            other_failing=tuple(n for n in final.failing if n not in wanted),
            solved_by=tuple(self.state.solved_by) if hasattr(self, "state") else (),
            turns=self.budget.turns,
            usage=self.budget.usage,
            seconds=self.budget.seconds,
            trajectory=self.trajectory.path,
            **more,
        )
