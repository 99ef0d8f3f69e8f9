"""Text to tokens and back."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_agent.engine.package import Package
from lsp_agent.engine.tokens import StopStrings, TextStream, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_package):
    return Tokenizer(Package(tiny_package()))


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<\ufffd"), max_size=40))
def test_streams_never_split_a_character(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == unicodedata.normalize("NFC", text)


def test_a_stream_that_ends_inside_a_character(tokenizer):
    ids = tokenizer.encode("aé")
    assert tokenizer.decode(ids[:-1]) == "a�"


def test_special_tokens(tokenizer):
    ids = tokenizer.encode("<|im_start|>x<|im_end|>")
    assert len(ids) == 3 and ids[2] in tokenizer.end_ids
    assert tokenizer.decode(ids) == "x"
    assert tokenizer.decode(tokenizer.encode("<tool_call>")) == "<tool_call>"


def test_infill_order(tokenizer):
    fim = tokenizer.fim
    ids = tokenizer.infill("ab", "c")
    assert ids == [fim["prefix"], *tokenizer.encode("ab"), fim["suffix"], *tokenizer.encode("c"), fim["middle"]]


def test_the_chat_template_of_the_checkpoint(tokenizer):
    ids = tokenizer.chat([{"role": "user", "content": "hi"}]).ids
    assert ids == tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@given(
    text=st.text(alphabet="abc", max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_strings_do_not_depend_on_how_the_text_arrives(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stream = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += stream.push(piece)
        assert not any(stop in shown for stop in stops)
    shown += stream.finish()
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text and not stream.found
    else:
        assert stream.found and text.startswith(shown)
        assert any(text.startswith(shown + stop) for stop in stops)
