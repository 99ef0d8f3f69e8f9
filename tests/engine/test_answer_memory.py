"""Prompts begin with the tokens that were read and drawn before, under the real chat templates."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tool_calls_samples import TOOLS

from lsp_agent.chat_model import Completion, Message
from lsp_agent.engine import answer_memory
from lsp_agent.engine.package import Package
from lsp_agent.engine.tokens import Tokenizer
from lsp_agent.engine.tool_calls import call_from_openai, call_to_openai, parse_answer

TEMPLATES = Path(__file__).parent / "templates"
REAL = ("qwen2.5-coder", "qwen3", "qwen3-coder")
END = "<|im_end|>"

HERMES = [
    'I read it.\n\n<tool_call>\n{"name":"read_file",   "arguments": {"whole":true,"path":"a b.py"}}\n</tool_call>',
    '<tool_call>\n{"name": "run_tests", "arguments": {}}\n</tool_call>',
    'Both.\n<tool_call>\n{"name": "read_file", "arguments": {"path": "\\u00e4.py"}}\n</tool_call>\n'
    '<tool_call>\n{"arguments": {"path": "x", "content": "<|im_end|>\\n"}, "name": "write_file"}\n</tool_call>',
]
XML = [
    "I read it.\n\n<tool_call>\n<function=read_file>\n<parameter=whole>\nTrue\n</parameter>\n<parameter=path>\na b.py"
    "\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=run_tests>\n</function>\n</tool_call>",
    "Both.\n<tool_call>\n<function=read_file>\n<parameter=path>ä.py</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=write_file>\n<parameter=path>\nx\n</parameter>\n<parameter=content>\n\n  y\n\n</parameter>"
    "\n</function>\n</tool_call>",
]
TEXTS = ["Done.", "  \n Leading and trailing \n\n", "", "```python\ndef f():\n    return 'ü'\n```", "é" * 40, "Done."]


@pytest.fixture(scope="module")
def tokenizer_of(tiny_package, tmp_path_factory) -> Callable[[str], Tokenizer]:
    """`tokenizer_of(template)`: a new tokenizer of the tiny model with a chat template, one of `REAL` or its text."""

    def make(template: str) -> Tokenizer:
        folder = tmp_path_factory.mktemp("template")
        shutil.copytree(tiny_package(), folder, dirs_exist_ok=True)
        text = (TEMPLATES / f"{template}.jinja").read_text() if template in REAL else template
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": text}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer(Package(folder))

    return make


def drawn(tokenizer: Tokenizer, text: str, seed: int) -> list[int]:
    """Tokens of a text as a model may draw them: cut anywhere, so mostly not as the tokenizer would."""
    cuts = random.Random(seed)
    ids: list[int] = []
    while text:
        size = cuts.randint(1, 3)
        ids += tokenizer.encode_text(text[:size])
        text = text[size:]
    return ids


def answer(tokenizer: Tokenizer, prompt: list[int], text: str, seed: int = 0) -> tuple[list[int], Message]:
    """Let the model say `text`; gives its tokens, and the message as a client sends it back."""
    tokens = [*drawn(tokenizer, text, seed), *tokenizer.encode(END)]
    parsed = parse_answer(text, tokenizer.tool_calls, TOOLS)
    assert not any(call.errors for call in parsed.calls)
    tokenizer.answers.remember(prompt, Completion(parsed.text, "stop", tool_calls=parsed.calls), tokens)
    calls = [call_to_openai(call) for call in parsed.calls]
    for call in calls:
        call.pop("lsp_agent", None)  # other makers' clients drop it
    sent = json.loads(json.dumps(calls))
    message: Message = {"role": "assistant", "content": parsed.text}
    return tokens, message | ({"tool_calls": [call_from_openai(call) for call in sent]} if sent else {})


def results(message: Message) -> list[Message]:
    return [
        {"role": "tool", "content": f"result of {call.name}\n", "tool_call_id": call.id}
        for call in message.get("tool_calls", ())
    ]


def conversation(tokenizer: Tokenizer, turns: int, seed: int) -> tuple[list[Message], list[int]]:
    """Hold a long conversation with calls, checking every prompt; gives it and what was read last."""
    choose = random.Random(seed)
    called = XML if tokenizer.tool_calls == "qwen3_coder" else HERMES
    messages: list[Message] = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Begin."}]
    read: list[int] = []
    for turn in range(turns):
        prompt = tokenizer.chat(messages, TOOLS).ids
        assert prompt[: len(read)] == read
        tokens, message = answer(tokenizer, prompt, choose.choice(called + TEXTS), turn)
        read = prompt + tokens
        messages += [message, *results(message)]
        if not message.get("tool_calls"):
            messages.append({"role": "user", "content": f"Go on: {turn}"})
    return messages, read


@pytest.mark.parametrize("template", REAL)
@pytest.mark.parametrize("seed", range(3))
def test_each_prompt_begins_with_the_last_one_and_its_answer(tokenizer_of, template, seed) -> None:
    tokenizer = tokenizer_of(template)
    messages, read = conversation(tokenizer, 10, seed)
    prompt = tokenizer.chat(messages, TOOLS).ids
    assert prompt[: len(read)] == read
    forgetful = tokenizer_of(template).chat(messages, TOOLS).ids
    assert forgetful[: len(read)] != read
    # The whole conversation is there, written in other ways.
    assert tokenizer.decode(prompt).count("result of") == tokenizer.decode(forgetful).count("result of")


@pytest.mark.parametrize("template", REAL)
def test_branches_and_retries_have_their_own_tokens(tokenizer_of, template) -> None:
    tokenizer = tokenizer_of(template)
    messages: list[Message] = [{"role": "user", "content": "Count."}]
    prompt = tokenizer.chat(messages).ids
    (first, said), (second, again) = (answer(tokenizer, prompt, text, 1) for text in ("return in", "return  in"))
    other: list[Message] = [{"role": "user", "content": "Count!"}]
    elsewhere = tokenizer.chat(other).ids
    third, _ = answer(tokenizer, elsewhere, "return in", 5)
    assert third != first
    more: Message = {"role": "user", "content": "More."}
    for before, tokens, turns in (
        (prompt, first, [*messages, said, more]),
        (prompt, second, [*messages, again, more]),
        (elsewhere, third, [*other, said, more]),
    ):
        assert tokenizer.chat(turns).ids[: len(before + tokens)] == before + tokens


@pytest.mark.parametrize("template", REAL)
def test_what_a_client_changed_is_written_anew(tokenizer_of, template) -> None:
    tokenizer, forgetful = tokenizer_of(template), tokenizer_of(template)
    messages, _ = conversation(tokenizer, 6, 1)
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    edited = [dict(message) for message in messages]
    edited[0]["content"] = "You hinder."
    assert tokenizer.chat(edited, TOOLS) == forgetful.chat(edited, TOOLS)
    edited = [dict(message) for message in messages]
    edited[first]["content"] += "!"
    assert tokenizer.chat(edited, TOOLS) == forgetful.chat(edited, TOOLS)


def test_changed_arguments_are_written_anew(tokenizer_of) -> None:
    tokenizer, forgetful = tokenizer_of("qwen2.5-coder"), tokenizer_of("qwen2.5-coder")
    user: Message = {"role": "user", "content": "Read."}
    _, message = answer(tokenizer, tokenizer.chat([user], TOOLS).ids, HERMES[0])
    (call,) = message["tool_calls"]
    call.arguments["path"] = "other.py"
    turns = [user, message, *results(message)]
    assert tokenizer.chat(turns, TOOLS) == forgetful.chat(turns, TOOLS)


def test_an_answer_that_was_cut_off_by_a_stop_string_is_remembered_up_to_there(tokenizer_of) -> None:
    tokenizer = tokenizer_of("qwen2.5-coder")
    user: Message = {"role": "user", "content": "hi"}
    prompt = tokenizer.chat([user]).ids
    kept, stop = drawn(tokenizer, "one two", 3), drawn(tokenizer, "STOP", 3)
    said: Message = {"role": "assistant", "content": "one two"}
    tokenizer.answers.remember(prompt, Completion("one two", "stop"), kept + stop)
    assert tokenizer.chat([user, said, user]).ids[: len(prompt + kept)] == prompt + kept
    # Where a token is in part of the stop string, nothing says what was given out.
    merged = tokenizer.encode("re")
    assert len(merged) == 1
    tokenizer.answers.remember(prompt, Completion("r", "stop"), merged)
    assert not tokenizer.answers.knows({"role": "assistant", "content": "r"})


def test_control_tokens_in_an_answer_are_not_spliced(tokenizer_of) -> None:
    tokenizer = tokenizer_of("qwen2.5-coder")
    prompt = tokenizer.chat([{"role": "user", "content": "hi"}]).ids
    (start,) = tokenizer.encode("<|im_start|>")
    tokenizer.answers.remember(
        prompt, Completion("ab", "stop"), [*tokenizer.encode("a"), start, *tokenizer.encode("b")]
    )
    assert not tokenizer.answers.knows({"role": "assistant", "content": "ab"})


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content[:1] }}",
        "{{ m.content }}{{ m.content }}",
        "{{ '' if m.role == 'assistant' else m.content }}",
        "{{ raise_exception('digits') if '0' in m.content or '1' in m.content else m.content }}",
        "{{ m.content }}{{ '<|im_end|>' if m.content == 'Done.' }}",
        "{{ m.content | replace('0', 'x') | replace('1', 'x') }}",
    ],
)
def test_templates_that_do_otherwise_with_an_answer_are_rendered_as_ever(tokenizer_of, body) -> None:
    turn = "{{ '<|im_start|>' + m.role }}\n" + body + "{{ '<|im_end|>\n' }}"
    template = "{% for m in messages %}" + turn + "{% endfor %}<|im_start|>assistant\n"
    tokenizer, forgetful = tokenizer_of(template), tokenizer_of(template)
    user: Message = {"role": "user", "content": "hi"}
    _, message = answer(tokenizer, tokenizer.chat([user]).ids, "Done.", 4)
    assert tokenizer.chat([user, message, user]) == forgetful.chat([user, message, user])


def test_memory_is_bounded_and_forgets_what_was_used_least_lately(tokenizer_of, monkeypatch) -> None:
    tokenizer = tokenizer_of("qwen2.5-coder")
    prompts = [tokenizer.chat([{"role": "user", "content": str(number)}]).ids for number in range(5)]

    def known() -> list[bool]:
        return [tokenizer.answers.knows({"role": "assistant", "content": f"answer {i}"}) for i in range(5)]

    monkeypatch.setattr(answer_memory, "MAX_ANSWERS", 3)
    for number, prompt in enumerate(prompts[:3]):
        answer(tokenizer, prompt, f"answer {number}")
    turns: list[Message] = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "answer 0"}]
    tokenizer.chat([*turns, {"role": "user", "content": "more"}])
    answer(tokenizer, prompts[3], "answer 3")
    assert known() == [True, False, True, True, False]
    monkeypatch.setattr(answer_memory, "MAX_TOKENS", 44)
    answer(tokenizer, prompts[4], "answer 4")
    assert known() == [False, False, False, True, True]


def test_a_prompt_in_which_no_turn_is_marked_counts_with_its_answer(tokenizer_of, monkeypatch) -> None:
    tokenizer = tokenizer_of("qwen2.5-coder")
    prompts = [tokenizer.encode_text(f"{number}" + " word" * 50) for number in range(3)]
    monkeypatch.setattr(answer_memory, "MAX_TOKENS", 2 * len(prompts[0]))
    for number, prompt in enumerate(prompts):
        answer(tokenizer, prompt, f"answer {number}")
    known = [tokenizer.answers.knows({"role": "assistant", "content": f"answer {i}"}) for i in range(3)]
    assert known == [False, False, True]


@pytest.mark.parametrize("template", REAL)
def test_boundaries_are_where_messages_end_and_begin(tokenizer_of, template) -> None:
    tokenizer = tokenizer_of(template)
    messages: list[Message] = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    prompt = tokenizer.chat(messages)
    texts = [tokenizer.decode(prompt.ids[:length]) for length in prompt.boundaries]
    assert list(prompt.boundaries) == sorted(set(prompt.boundaries)) and prompt.boundaries[-1] <= len(prompt.ids)
    for message in messages:
        role, content = message["role"], message["content"]
        ends = [text for text in texts if text.endswith(f"{role}\n{content}\n")]
        begins = [text for text in texts if text.endswith(f"{role}\n")]
        assert ends, message
        assert begins or len(tokenizer.encode(role)) > 7
