"""Calls of the model: each is a turn, counted, recorded and limited."""

from __future__ import annotations

import time
from dataclasses import replace

from lsp_agent.agent import events
from lsp_agent.agent.budget import Budget, BudgetSpent
from lsp_agent.agent.candidates import Ask
from lsp_agent.agent.deadline import Deadline
from lsp_agent.agent.naturalness import Surprise
from lsp_agent.agent.prompts import FileTokens, Problem, View, fitting, score_text
from lsp_agent.agent.trajectory import Trajectory
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel, Completion, Usage
from lsp_agent.errors import Cancelled, PromptTooLong, Unsupported

CHARACTERS_PER_TOKEN = 2.5
"""Of code, on the low side: what is cut by this number fits, but for odd texts, of which the engine says so."""


class Asking:
    """The model of one run, behind its budget."""

    def __init__(
        self,
        model: ChatModel,
        budget: Budget,
        trajectory: Trajectory,
        on_event: events.OnEvent,
        cancel: CancelToken,
    ) -> None:
        self.model = model
        self._budget = budget
        self._trajectory = trajectory
        self._on_event = on_event
        self._cancel = cancel
        self._surprises: dict[str, Surprise | None] = {}
        self.cannot: dict[str, str] = {}
        """What the model's server turned out not to do (`infill`, `score`), each with its sentence: done without."""
        # Models without file separators get the test as plain code in front.
        self.file_tokens = FileTokens(*model.file_tokens) if model.file_tokens else None

    def ask(self, ask: Ask) -> list[str]:
        """Answers to one ask; none when its prompt does not fit, or the model cannot do what is asked.

        Raises `BudgetSpent` at a limit, and `Cancelled`.
        """
        budget = self._budget
        budget.check()
        if not ask.messages and "infill" in self.cannot:
            return []
        budget.turns += 1
        self._on_event(events.Trying(budget.turns, ask.stage, ask.where, budget.tokens, budget.seconds))
        began = time.monotonic()
        cancel = Deadline(self._cancel, budget.seconds_left)
        sampling = ask.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + budget.turns)  # the same place asked again differs
        completions: list[Completion] = []
        problem = ""
        prefix, suffix = fitting(ask.prefix, ask.suffix, self._characters(sampling.max_tokens))
        try:
            if ask.messages:
                completions = self.model.chat(ask.messages, sampling, cancel, ask.n)
            else:
                completions = self.model.infill(prefix, suffix, sampling, cancel, ask.n)
        except PromptTooLong as error:
            problem = str(error)
        except Unsupported as error:
            if ask.messages:
                raise
            problem = self.cannot["infill"] = str(error)
        except Cancelled:
            self._cancel.raise_if_cancelled()
            raise BudgetSpent(f"the limit of {budget.limits.max_seconds:.0f} seconds was reached") from None
        finally:
            used = sum((c.usage for c in completions), Usage())
            budget.usage += used
            prompt = {"messages": ask.messages} if ask.messages else {"prefix": prefix, "suffix": suffix}
            self._trajectory.write(
                "ask",
                {
                    "turn": budget.turns,
                    "stage": ask.stage,
                    "where": ask.where,
                    **prompt,
                    "n": ask.n,
                    "temperature": sampling.temperature,
                    "seed": sampling.seed,
                    "answers": [c.text for c in completions],
                    "usage": vars(used),
                    "seconds": round(time.monotonic() - began, 3),
                    **({"problem": problem} if problem else {}),
                },
            )
        return [c.text for c in completions]

    def surprise(self, view: View, problem: Problem) -> Surprise | None:
        """How surprising the model finds a region, given the failing test.

        None without time, if it is too long, or if the model's server does not tell.
        """
        scored = score_text(view, problem)
        if scored is None or "score" in self.cannot:
            return None
        text, offset = scored
        if len(text) > self._characters(0):
            return None
        if text not in self._surprises:
            began = time.monotonic()
            try:
                scores = self.model.score(text, Deadline(self._cancel, self._budget.seconds_left))
            except Cancelled:
                self._cancel.raise_if_cancelled()
                return None
            except PromptTooLong:
                self._surprises[text] = None
                return None
            except Unsupported as error:
                self.cannot["score"] = str(error)
                return None
            # A score reads the text once; nothing is written.
            used = Usage(prompt_tokens=len(scores))
            self._budget.usage += used
            self._surprises[text] = Surprise.of(scores, offset)
            seconds = round(time.monotonic() - began, 3)
            self._trajectory.write("score", {"where": str(view.region), "usage": vars(used), "seconds": seconds})
        return self._surprises[text]

    def _characters(self, max_tokens: int) -> int:
        """How long a prompt may be that leaves room for an answer."""
        return int(max(0, self.model.context_length - max_tokens) * CHARACTERS_PER_TOKEN)
