"""In which order candidates are asked for: cheapest and most suspicious first.

The order and the sizes come from all candidates of 50 small bugs, generated and tested once with a 1.5B model: the most
surprising statements and expressions solve 34 of them greedily, groups of statements 5 more, the whole body 1, the rest
is for sampling and for second edits on candidates that got further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lsp_agent.agent.candidates import Ask, cloze, rewrite
from lsp_agent.agent.localise import Suspect
from lsp_agent.agent.naturalness import Surprise
from lsp_agent.agent.prompts import FileTokens, Problem, View, view
from lsp_agent.agent.regions import MODULE, Region, same_region
from lsp_agent.agent.source import Source
from lsp_agent.agent.spans import (
    Span,
    body_span,
    expression_spans,
    gap_spans,
    group_spans,
    statement_spans,
)
from lsp_agent.chat_model import Sampling

FIRST_SUSPECTS = 3
FIRST_SPANS = 8
FIRST_GROUPS = 2
FIRST_SAMPLED = 4
SECOND_EDIT_SPANS = 6
MOST_SEEDS = 2
GROUP_LINES = 14
SCORED_SUSPECT = 0.5
"""Less suspicious regions are not worth the reading."""
UNSCORED = 0.1
"""Surprise taken for granted there, in nats a character."""
MOST_PLACES = 60
BODY_LINES = 30
INSIDE_FACTOR = 0.5
"""How much an expression counts whose whole statement is asked for too."""
SIGNATURE_FACTOR = 0.1
LEAST_FACTOR = 0.1
"""How little a span counts that the failing test did not run."""
FRAMED = 2.0
"""How much more a span counts that the traceback names."""


@dataclass(frozen=True)
class Place:
    """A span of a suspect, with how much it is suspected."""

    view: View
    span: Span
    total: float
    mean: float


@dataclass
class Search:
    """Proposes asks for one failing test, from one state of the tree."""

    suspects: Sequence[Suspect]
    problem: Problem
    tokens: FileTokens | None
    read: Callable[[str], Source | None]
    """Text of a file in the state that the search starts from."""
    surprise: Callable[[View, Problem], Surprise | None]
    seed: int = 0
    seeds: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Candidates that got further, as (depth, changed texts): the caller adds, second edits start from them."""
    _seeded: int = 0

    def asks(self) -> Iterator[Ask]:
        """All that is worth asking, until the caller stops or nothing new is left."""
        for low in range(0, len(self.suspects), FIRST_SUSPECTS):
            yield from self._round(self.suspects[low : low + FIRST_SUSPECTS])
        for low in range(0, len(self.suspects), FIRST_SUSPECTS):
            yield from self._hot(self.suspects[low : low + FIRST_SUSPECTS], round_number=1)
        for number in range(2, 6):
            yield from self._hot(self.suspects[:FIRST_SUSPECTS], round_number=number)

    def _round(self, suspects: Sequence[Suspect]) -> Iterator[Ask]:
        views = self._views(suspects)
        spans = self._places(views, lambda t, r: [*statement_spans(t, r), *expression_spans(t, r)])
        groups = self._places(views, group_spans, by_mean=True)
        groups = [p for p in groups if p.span.of(p.view.source.text).count("\n") < GROUP_LINES]
        sampled = [p for p in spans if p.span.kind != "operator"]
        bodies = [(v, b) for _, v in views if (b := self._small_body(v)) is not None]
        warm = replace(WARM, seed=self.seed)

        yield from (self._cloze("cloze", p) for p in spans[:FIRST_SPANS])
        yield from (self._cloze("group", p) for p in groups[:FIRST_GROUPS])
        yield from self._second_edits()
        yield from (self._cloze("sampled cloze", p, warm, 3) for p in sampled[:FIRST_SAMPLED])
        for v, body in bodies[:2]:
            yield cloze.ask("body", v, body, self.problem, self.tokens)
        for v in [v for _, v in views if v.region.name != MODULE][:2]:
            yield rewrite.ask("rewrite", v, self.problem, Sampling(), diagnose=False)
            yield rewrite.ask("sampled rewrite", v, self.problem, warm, n=3, diagnose=False)
        yield from (self._cloze("cloze", p) for p in spans[FIRST_SPANS : 2 * FIRST_SPANS])
        yield from (self._cloze("group", p) for p in groups[FIRST_GROUPS:])
        yield from self._second_edits()
        yield from (self._cloze("sampled cloze", p, warm, 3) for p in sampled[FIRST_SAMPLED : 3 * FIRST_SAMPLED])
        yield from (self._cloze("cloze", p) for p in spans[2 * FIRST_SPANS :])
        yield from (self._cloze("insertion", p) for p in self._places(views, gap_spans))
        yield from self._second_edits()

    def _hot(self, suspects: Sequence[Suspect], round_number: int) -> Iterator[Ask]:
        """Sampling afresh: other seeds, hints of what is wrong, a diagnosis before the rewrite."""
        views = self._views(suspects)
        hot = replace(WARM, temperature=min(1.2, 0.7 + 0.15 * round_number), seed=self.seed + round_number)
        spans = self._places(views, lambda t, r: [*statement_spans(t, r), *expression_spans(t, r)])
        for v in [v for _, v in views if v.region.name != MODULE][:2]:
            yield rewrite.ask("diagnosed rewrite", v, self.problem, hot, n=3, diagnose=True)
            body = self._small_body(v)
            if body is not None:
                yield cloze.ask("sampled body", v, body, self.problem, self.tokens, sampling=hot, n=3)
        plain = round_number % 2 == 1
        for place in spans[: 6 * round_number]:
            hinted = place.span.kind in ("statement", "header")
            stage = "hinted cloze" if hinted else "sampled cloze"
            yield self._cloze(stage, place, hot, 4, hinted=hinted, plain=plain)
        yield from self._second_edits()
        for place in self._places(views, group_spans, by_mean=True)[:4]:
            yield self._cloze("sampled group", place, hot, 3)

    def _second_edits(self) -> Iterator[Ask]:
        """Pairs of spans: another statement refilled on top of the candidates that got furthest."""
        fresh = sorted(self.seeds[self._seeded :], key=lambda s: (-s[0], sum(map(len, s[1].values()))))[:MOST_SEEDS]
        self._seeded = len(self.seeds)
        for _, texts in fresh:
            places = []
            for suspect in self.suspects[:FIRST_SUSPECTS]:
                before, source = self.read(suspect.region.path), self._read_over(texts, suspect.region.path)
                region = same_region(source, suspect.region) if source is not None else None
                if before is None or source is None or region is None:
                    continue
                v = view(source, region)
                known = self._by_text(suspect, view(before, suspect.region))
                # What the first edit wrote is not refilled again; the rest is as surprising as it was.
                for span in statement_spans(source.text, region):
                    if (weight := known.get(span.of(source.text))) is not None:
                        places.append(Place(v, span, weight, 0.0))
            for place in sorted(places, key=lambda p: -p.total)[:SECOND_EDIT_SPANS]:
                yield replace(self._cloze("second edit", place), base=texts)

    def _by_text(self, suspect: Suspect, v: View) -> dict[str, float]:
        places = self._places([(suspect, v)], statement_spans)
        return {p.span.of(v.source.text): p.total for p in reversed(places)}

    def _read_over(self, texts: Mapping[str, str], path: str) -> Source | None:
        source = self.read(path)
        return replace(source, text=texts[path]) if source is not None and path in texts else source

    def _views(self, suspects: Sequence[Suspect]) -> list[tuple[Suspect, View]]:
        return [(s, view(source, s.region)) for s in suspects if (source := self.read(s.region.path)) is not None]

    def _places(
        self,
        views: Sequence[tuple[Suspect, View]],
        spans_of: Callable[[str, Region], list[Span]],
        *,
        by_mean: bool = False,
    ) -> list[Place]:
        places = []
        for suspect, v in views:
            surprise = self.surprise(v, self.problem) if suspect.score >= SCORED_SUSPECT else None
            spans = spans_of(v.source.text, v.region)
            statements = [s for s in spans if s.kind in ("statement", "header")]
            for span in spans:
                weight = suspect.score**2 * _line_factor(suspect, span, v.source.text)
                if span.kind in ("expression", "operator") and any(s.start <= span.start < s.end for s in statements):
                    weight *= INSIDE_FACTOR
                elif span.kind == "header" and span.of(v.source.text).startswith(("def ", "async def ")):
                    weight *= SIGNATURE_FACTOR
                total = surprise.total(span) if surprise else UNSCORED * (span.end - span.start)
                mean = surprise.mean(span) if surprise else 1.0
                places.append(Place(v, span, weight * total, weight * mean))
        if by_mean:
            return sorted(places, key=lambda p: -p.mean)[:MOST_PLACES]
        return sorted(places, key=lambda p: (-p.total, p.span.start - p.span.end))[:MOST_PLACES]

    def _cloze(
        self,
        stage: str,
        p: Place,
        sampling: Sampling | None = None,
        n: int = 1,
        *,
        hinted: bool = False,
        plain: bool = False,
    ) -> Ask:
        """`plain` shows the test as code in front instead of as a file of its own: another prompt, other answers."""
        tokens = None if plain else self.tokens
        return cloze.ask(stage, p.view, p.span, self.problem, tokens, sampling=sampling, n=n, hinted=hinted)

    def _small_body(self, v: View) -> Span | None:
        body = body_span(v.source.text, v.region)
        return body if body is not None and body.of(v.source.text).count("\n") < BODY_LINES else None


WARM = Sampling(temperature=0.8, top_p=0.95)


def _line_factor(suspect: Suspect, span: Span, text: str) -> float:
    lines = range(span.line, span.line + span.of(text).count("\n") + 1)
    if any(line in suspect.framed for line in lines):
        return FRAMED
    return 1.0 if not suspect.executed or any(line in suspect.executed for line in lines) else LEAST_FACTOR
