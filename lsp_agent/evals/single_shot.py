"""The control: one greedy chat rewrite of the function, given the failing test and its output; no second try."""

from __future__ import annotations

from typing import Any

from lsp_agent.agent.candidates import rewrite
from lsp_agent.agent.deadline import Deadline
from lsp_agent.agent.gates import Gates
from lsp_agent.agent.localise import localise
from lsp_agent.agent.prompts import problem, view
from lsp_agent.agent.regions import MODULE
from lsp_agent.agent.tree import Originals
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel, Sampling
from lsp_agent.errors import Cancelled, UserError
from lsp_agent.testing.runner import Runner
from lsp_agent.workspace.scratch import ScratchTree
from lsp_agent.workspace.workspace import Workspace

TEST_TIMEOUT_S = 60.0


def single_shot(
    workspace: Workspace, runner: Runner, model: ChatModel, max_seconds: float, cancel: CancelToken
) -> dict[str, Any]:
    """Rewrite the most suspicious function once; returns the fields of a result row."""
    with ScratchTree(workspace) as scratch:
        before = runner.run(scratch.path, timeout_s=TEST_TIMEOUT_S, cancel=cancel, coverage=True)
        if not before.failing:
            raise UserError("No test fails.")
        originals = Originals(scratch)
        result = before.results[before.failing[0]]
        test = originals.source(result.path)
        about = problem(result, test.text if test else "")
        files = workspace.files()
        suspects = localise(result, before, originals.source, files, runner.is_protected, about.test)
        suspect = next((s for s in suspects if s.region.name != MODULE), None)
        source = originals.source(suspect.region.path) if suspect else None
        if suspect is None or source is None:
            return {"status": "not_green", "reason": "no function to rewrite", "turns": 0}
        ask = rewrite.ask("single shot", view(source, suspect.region), about, Sampling(), diagnose=False)
        try:
            answer = model.chat(ask.messages, ask.sampling, Deadline(cancel, max_seconds))[0]
        except Cancelled:
            cancel.raise_if_cancelled()
            return {"status": "not_green", "reason": "out of time", "turns": 1}
        row: dict[str, Any] = {
            "turns": 1,
            "stage": ask.stage,
            "tokens_read": answer.usage.prompt_tokens - answer.usage.cached_tokens,
            "tokens_written": answer.usage.completion_tokens,
            "answer": answer.text,
        }
        text = ask.build(answer.text)
        path = suspect.region.path
        refused = "no usable answer" if text is None else Gates().refuse(path, source.text, {path: text})
        changes = originals.changes({path: text}) if text is not None else None
        if refused or not changes:
            return {**row, "status": "not_green", "reason": refused or "no change"}
        scratch.reset()
        scratch.apply(changes)
        after = runner.run(scratch.path, timeout_s=TEST_TIMEOUT_S, cancel=cancel)
        return {**row, "solved": after.green, "status": "green" if after.green else "not_green"}
