"""A lent model answers as its own, and stays open when the job that has it closes it."""

from __future__ import annotations

from conftest import FakeModel

from lsp_agent.borrowed import Borrowed
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel, Sampling


def test_a_lent_model_stays_open() -> None:
    owned = FakeModel(infills=str.upper, chats=str.lower, file_tokens=("<a>", "<b>"))
    lent: ChatModel = Borrowed(owned)
    lent.close()
    assert owned.closed == 0
    assert (lent.name, lent.tier, lent.context_length, lent.file_tokens) == ("fake", "small", 8192, ("<a>", "<b>"))
    assert lent.infill("a", "b", Sampling(), CancelToken())[0].text == "A<FILL>B"
    assert len(lent.chat([{"role": "user", "content": "Hi"}], Sampling(), CancelToken(), n=2)) == 2
    assert lent.score("xy", CancelToken()) == owned.score("xy", CancelToken())
