"""Random answers under a constraint, as a model without any sense gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lsp_agent.chat_model import Sampling
from lsp_agent.engine.constraints import Constraint
from lsp_agent.engine.sampling import HostLogits, Sampler
from lsp_agent.engine.tokens import Tokenizer


def say(
    make: Callable[[], Constraint] | None,
    tokenizer: Tokenizer,
    seed: int,
    most: int = 200,
    phrases: Sequence[str] = (),
    each: Callable[[str, bool], None] | None = None,
    ending: float = 4,
) -> str | None:
    """Draw an answer token by token, checking the constraint's promises; None where it is not done after `most`.

    Tokens are drawn at random or, half of the time, spell one of `phrases` as far as that is allowed. `each` is told
    the text so far and whether it may end there. `ending`: how much likelier ending is than any other token.
    """
    assert make is not None
    constraint, random = make(), np.random.default_rng(seed)
    sampler = Sampler(Sampling(temperature=1, seed=seed))
    controls = sorted(tokenizer.control_ids - tokenizer.end_ids)
    spelled: list[int] = []
    tokens: list[int] = []
    while len(tokens) < most:
        allowed, forced = constraint.allowed(), constraint.forced()
        assert allowed.dtype == bool and allowed.shape == (tokenizer.vocabulary,) and allowed.any()
        assert not allowed[controls].any()
        may_end = bool(allowed[sorted(tokenizer.end_ids)].any())
        assert not constraint.ended() or (may_end and allowed.sum() <= len(tokenizer.end_ids))
        if each is not None:
            each(tokenizer.decode(tokens), may_end)
        if forced:
            assert np.flatnonzero(allowed).tolist() == forced[:1]
        if not spelled and phrases and random.random() < 0.5:
            spelled = tokenizer.encode(phrases[random.integers(len(phrases))])
        if spelled and allowed[spelled[0]]:
            token = spelled.pop(0)
        else:
            spelled = []
            logits = random.normal(size=tokenizer.vocabulary).astype(np.float32)
            logits[sorted(tokenizer.end_ids)] += ending
            token = sampler.draw(HostLogits(logits), tokens, allowed)
        assert allowed[token]
        if token in tokenizer.end_ids:
            return tokenizer.decode(tokens)
        constraint.accept(token)
        if constraint.left_out():
            assert constraint.ended() and may_end
            return tokenizer.decode(tokens)
        tokens.append(token)
    return None
