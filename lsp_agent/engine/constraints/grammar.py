"""Grammars on a model's own vocabulary, over llguidance: an Earley parser on lexemes, run along a trie of the tokens.

llguidance is imported when the first grammar is compiled: commands that constrain nothing do without it.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, ref

import numpy as np

from lsp_agent.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from lsp_agent.engine.constraints import Constraint
    from lsp_agent.engine.tokens import Tokenizer

MAX_CHARACTERS = 1 << 18
"""Longest grammar, in characters of its source."""
MAX_FIRST_MASK_SECONDS = 0.5
"""Of computing. Real formats take milliseconds; those that take longer would hold up everybody at each token."""
KEPT_GRAMMARS = 64
"""Compiled grammars that are kept for each tokenizer; one takes some 10 kB to some MB."""

_PADDING = re.compile(r"\[PAD\d+\]")
"""Converters to GGUF fill the vocabulary up with such tokens."""


def lark(text: str) -> str:
    """A grammar in llguidance's Lark."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(_unicode(text))


def regex(pattern: str) -> str:
    """A regular expression (Rust's syntax, without look-around) for the whole answer."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(_unicode(pattern))


def terminal(pattern: str) -> str:
    """A regular expression as a terminal of a Lark grammar."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(_unicode(pattern), '')}/"


def works(pattern: Any) -> bool:
    """Whether a JSON schema's pattern is one that can be enforced."""
    from llguidance import LLMatcher

    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern}))


def json_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema, perhaps with llguidance's `x-guidance`."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(dict(schema))


def _unicode(text: str) -> str:
    """The text; raises `UserError` where it holds halves of surrogate pairs, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("What answers must look like is not valid Unicode; correct it.") from error
    return text


def compile_grammar(grammar: str, tokenizer: Tokenizer, what: str) -> Callable[[], Constraint]:
    """Compile a grammar once; the result makes a constraint that is at the answer's beginning. Thread-safe.

    `what` names the grammar in errors. Raises `UserError` when it is wrong, too large, or lets no answer through.
    """
    return _vocabulary(tokenizer).compiled(grammar, what)


def beginning_with_no_space(tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of text that begin with something else than whitespace, bool [vocabulary]."""
    return _vocabulary(tokenizer).beginning_with_no_space


class GrammarConstraint:
    """One answer under a grammar; see `Constraint`."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, what: str) -> None:
        self._matcher, self._vocabulary, self._what = matcher, vocabulary, what
        self._mask: np.ndarray | None = None

    def allowed(self) -> np.ndarray:
        """See `Constraint.allowed`."""
        if self._mask is None:
            try:
                bits = self._matcher.compute_bitmask()
            except ValueError as error:
                raise self._failed() from error
            if self._matcher.is_error():
                raise self._failed()
            self._mask = self._vocabulary.mask(bits)
        return self._mask

    def accept(self, token: int) -> None:
        """See `Constraint.accept`. Raises ValueError for a token that is not allowed."""
        allowed, self._mask = self.allowed()[token], None
        if not allowed:
            raise ValueError(f"token {token} is not allowed here")
        self._matcher.consume_token(token)  # what goes wrong now shows in the next mask

    def forced(self) -> list[int]:
        """See `Constraint.forced`. Where two ways of cutting the text into tokens are open, nothing is forced."""
        return self._matcher.compute_ff_tokens()

    def ended(self) -> bool:
        """See `Constraint.ended`."""
        return self._matcher.is_stopped()

    def left_out(self) -> bool:
        """See `Constraint.left_out`."""
        return False

    def _failed(self) -> UserError:
        if self._matcher.get_error().startswith("NoExtension"):
            return UserError(f"{self._what} lets no answer through; correct it.")
        return UserError(f"{self._what} became too complex on the way; make it simpler.")


class Vocabulary:
    """A tokenizer's tokens as llguidance wants them, and the grammars that were compiled for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLParserLimits, LLTokenizer

        self._size = tokenizer.vocabulary
        self._never = np.array(sorted(tokenizer.control_ids - tokenizer.end_ids), np.int64)
        self._end = sorted(tokenizer.end_ids)
        tokens = _Tokens(tokenizer)
        self._tokens: LLTokenizer = LLTokenizer(cast(Any, tokens), self._size, self._end)
        self.beginning_with_no_space = np.array([bool(text[:1].strip()) for text in tokens.tokens], np.bool_)
        self.beginning_with_no_space[sorted(tokenizer.control_ids)] = False
        self._limits: LLParserLimits = LLParserLimits(
            step_lexer_fuel=50_000, max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False
        )
        self._lock = threading.Lock()
        self._grammars: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def compiled(self, grammar: str, what: str) -> Callable[[], Constraint]:
        """See `compile_grammar`."""
        key = grammar, what
        with self._lock:
            matcher = self._grammars.get(key)
            if matcher is not None:
                self._grammars.move_to_end(key)
        if matcher is None:
            matcher = self._compile(grammar, what)
            with self._lock:
                self._grammars[key] = matcher
                while len(self._grammars) > KEPT_GRAMMARS:
                    self._grammars.popitem(last=False)
        return lambda: GrammarConstraint(matcher.deep_copy(), self, what)

    def _compile(self, grammar: str, what: str) -> LLMatcher:
        from llguidance import LLMatcher

        if len(grammar) > MAX_CHARACTERS:
            raise UserError(f"{what} is longer than {MAX_CHARACTERS} characters; make it shorter.")
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UserError(f"{what} cannot be used: {_one_line(matcher.get_error())}.")
        self._try(matcher.deep_copy(), what)
        return matcher

    def _try(self, matcher: LLMatcher, what: str) -> None:
        """See what the first mask says of a format that is too complex, or that nothing can satisfy."""
        started = time.thread_time()
        may_end = matcher.is_accepting()
        mask = GrammarConstraint(matcher, self, what).allowed()
        if not may_end and mask[self._end].any():
            raise UserError(f"{what} lets no answer through; correct it.")
        if time.thread_time() - started > MAX_FIRST_MASK_SECONDS:
            raise UserError(f"{what} is too complex; make it simpler.")

    def mask(self, bits: bytes) -> np.ndarray:
        """llguidance's bits as bool [vocabulary], without control tokens: a grammar could ask for them by name."""
        packed = np.frombuffer(bits, np.uint8)
        mask = np.unpackbits(packed, bitorder="little", count=self._size).view(np.bool_)
        mask[self._never] = False
        if not mask.any():
            mask[self._end] = True
        return mask


class _Tokens:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        controls = tokenizer.control_ids
        self.eos_token_id = min(tokenizer.end_ids)
        self.special_token_ids = sorted(controls)
        self.tokens = [
            tokenizer.token_name(token).encode() if token in controls else self._bytes(tokenizer, token)
            for token in range(tokenizer.vocabulary)
        ]
        self._tokenizer = ref(tokenizer)  # llguidance's objects take part in no garbage collection

    @staticmethod
    def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
        return b"" if _PADDING.fullmatch(tokenizer.token_name(token)) else tokenizer.token_bytes(token)

    def __call__(self, text: str | bytes) -> list[int]:
        tokenizer = self._tokenizer()
        assert tokenizer is not None
        return tokenizer.encode_text(text if isinstance(text, str) else text.decode())


_VOCABULARIES: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    with _LOCK:
        vocabulary = _VOCABULARIES.get(tokenizer)
        if vocabulary is None:
            vocabulary = _VOCABULARIES[tokenizer] = Vocabulary(tokenizer)
        return vocabulary


def _one_line(error: str) -> str:
    """The part of llguidance's message that says what is wrong: regex errors say it in their last lines."""
    lines = [line.strip() for line in error.splitlines() if line.strip() and not line.strip().startswith("<")]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (reasons or lines or ["it is not valid"])[0][:300].rstrip(".")
