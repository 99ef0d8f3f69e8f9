"""Vocabularies and chat templates of Hugging Face folders that differ from what the engine knows."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine
from lsp_agent.errors import UserError

NEXT = "qwen3-next"


def test_a_vocabulary_that_is_not_of_bytes_is_refused(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder(NEXT), tmp_path / "c")
    Tokenizer(models.WordLevel({"\u2581def": 0, "[UNK]": 1}, "[UNK]")).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="vocabulary that is not of bytes"):
        import_checkpoint(folder, tmp_path / "p")


def test_of_several_chat_templates_the_default_is_taken(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder(NEXT), tmp_path / "c")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": name, "template": name + "{{ messages[0].content }}"} for name in ("rag", "default")]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    import_checkpoint(folder, tmp_path / "p")
    engine = Engine.load(tmp_path / "p", threads=1)
    prompt = engine.chat_prompt([{"role": "user", "content": "hi"}]).ids
    assert engine.tokenizer.decode(prompt) == "defaulthi"
