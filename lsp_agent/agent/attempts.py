"""What came closest in a run that ends without success: shown, never applied."""

from __future__ import annotations

from dataclasses import dataclass, field

from lsp_agent.agent.judge import Verdict

Texts = dict[str, str]


@dataclass
class Attempts:
    """Candidates that are no progress but worth a look, as texts of changed files."""

    further: Texts = field(default_factory=dict)
    """The last that failed later in the test, and made nothing worse."""
    breaking: Texts = field(default_factory=dict)
    """The one that makes the target pass and the fewest other tests worse."""
    verdict: Verdict | None = None
    """What the tests said of `breaking`."""

    def keep_breaking(self, texts: Texts, verdict: Verdict) -> None:
        """Keep a candidate that breaks other tests, if it breaks fewer than the one that is kept."""
        if self.verdict is None or len(verdict.broken) < len(self.verdict.broken):
            self.breaking, self.verdict = texts, verdict
