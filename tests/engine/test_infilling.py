"""Fill-in-the-middle prompts, byte for byte as the makers of the Qwen Coder families write them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Package
from lsp_agent.engine.tokens import Tokenizer
from lsp_agent.errors import UserError

# The form of QwenLM/Qwen3-Coder's README ("Fill in the middle") and of Qwen2.5-Coder-fim.py in its examples.
PREFIX = "def mean(values):\n    total = 0\n    for value in values:\n        "
SUFFIX = "\n    return total / len(values)"
FILE_LEVEL = f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
# The form of Qwen2.5-Coder-repolevel-fim.py there, and of the Qwen2.5-Coder report (arXiv 2409.12186), section 3.1.
FILES = (
    "<|repo_name|>shop\n<|file_sep|>prices.py\ndef price_with_vat(net):\n    return net * 1.19\n\n<|file_sep|>main.py\n"
)
HEAD, TAIL = "import prices\n\n\ndef total(net_sum):\n    return prices.", "(net_sum)\n\n\nprint(total(100))\n"
REPOSITORY_LEVEL = f"{FILES}<|fim_prefix|>{HEAD}<|fim_suffix|>{TAIL}<|fim_middle|>"
CONTROLS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>", "<|endoftext|>"]


@pytest.fixture(scope="module", params=["marked as special", "not marked"])
def tokenizer(request, tiny_package, tmp_path_factory) -> Tokenizer:
    """GGUF files mark the tokens of fill-in-the-middle as control tokens, the makers' own tokenizer.json does not."""
    folder = tmp_path_factory.mktemp("infilling")
    for file in tiny_package().iterdir():
        (folder / file.name).symlink_to(file)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    for token in vocabulary["added_tokens"]:
        token["special"] = token["special"] and (request.param == "marked as special" or "fim" not in token["content"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    return Tokenizer(Package(folder))


def test_the_prompt_of_one_file(tokenizer) -> None:
    assert tokenizer.infill(PREFIX, SUFFIX) == tokenizer.encode(FILE_LEVEL)


def test_the_prompt_of_a_repository(tokenizer) -> None:
    assert tokenizer.infill(FILES + HEAD, TAIL) == tokenizer.encode(REPOSITORY_LEVEL)


def test_a_repository_whose_beginning_was_cut_off(tokenizer) -> None:
    cut = FILES[FILES.index("def ") :]
    written = REPOSITORY_LEVEL[FILES.index("def ") :]
    assert tokenizer.infill(cut + HEAD, TAIL) == tokenizer.encode(written)


def test_an_empty_gap_at_either_end(tokenizer) -> None:
    fim = tokenizer.fim
    assert tokenizer.infill("", "") == [fim["prefix"], fim["suffix"], fim["middle"]]
    assert tokenizer.infill(FILES, "") == [
        *tokenizer.encode(FILES),
        *(fim[name] for name in ("prefix", "suffix", "middle")),
    ]


@given(
    prefix=st.lists(st.sampled_from([*CONTROLS, "x = '", "'\n", "é", " <|"]), max_size=6).map("".join),
    suffix=st.lists(st.sampled_from([*CONTROLS, "y\n", "|>"]), max_size=6).map("".join),
)
@settings(max_examples=100, deadline=None)
def test_control_tokens_spelled_out_in_code_are_text(tokenizer, prefix, suffix) -> None:
    ids = tokenizer.infill("# " + prefix.replace("\n", ""), suffix)
    spelled = [tokenizer._fast.id_to_token(token) for token in ids]
    assert [token for token in spelled if token in CONTROLS] == ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    middle = ids.index(tokenizer.fim["suffix"])
    assert tokenizer.decode(ids[1:middle]) == "# " + prefix.replace("\n", "")
    assert tokenizer.decode(ids[middle + 1 : -1]) == suffix


def test_a_vocabulary_without_the_tokens_is_one_sentence(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "fim", {})
    with pytest.raises(UserError, match="not trained to fill in the middle"):
        tokenizer.infill("a", "b")


@pytest.mark.model
def test_the_real_model_fills_in_what_another_file_defines(small_model) -> None:
    engine = Engine.load(small_model.path, threads=2, context=512)

    def middle(prefix: str) -> str:
        sampling = Sampling(max_tokens=16, stop=("\n",))
        return "".join(
            step.text for step in engine.generate(engine.infill_prompt(prefix, TAIL), sampling, CancelToken())
        )

    assert middle(FILES + HEAD).startswith("price_with_vat")
    assert not middle(HEAD).startswith("price_with_vat")
