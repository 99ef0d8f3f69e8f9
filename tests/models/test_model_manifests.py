"""The shipped manifests, the schema that checks them, and their way into the wheel."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from tiny_model import tiny_manifest, write_manifest

from lsp_agent.errors import UserError
from lsp_agent.models import manifest
from lsp_agent.models.manifest import Manifest

REPOSITORY = Path(manifest.__file__).parents[2]
SHIPPED = ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen3-coder-30b-a3b", "qwen3-coder-next"]


def test_what_is_shipped() -> None:
    models = {m.name: m for m in manifest.shipped()}
    assert list(models) == SHIPPED
    for model in models.values():
        assert (model.license, model.tier) == ("Apache-2.0", "small" if "2.5" in model.name else "large")
        assert model.source
        assert model.source.repository.startswith("Qwen/")
        assert model.fim
    for name in SHIPPED[:2]:
        source = models[name].source
        assert source
        assert source.sha256
        assert models[name].pypi
    for name in SHIPPED[2:]:  # not known where this was written, and never made up
        source = models[name].source
        assert source
        assert (source.sha256, source.size_bytes, models[name].pypi) == (None, None, None)


def test_file_names_are_model_names() -> None:
    for path in (REPOSITORY / "models").glob("*.toml"):
        assert manifest.load(path).name == path.stem


def _broken(**changes: object) -> dict:
    data = tiny_manifest().model_dump(mode="json", exclude_none=True)
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            data[section][field] = value
        else:
            data[section] = value
    return data


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"name": "../evil"}, "name"),
        ({"tier": "huge"}, "tier"),
        ({"source__sha256": "abc"}, "sha256"),
        ({"source__files": ["../../x"]}, "files"),
        ({"source__size_bytes": 10}, "do not add up"),
        ({"pypi__count": 4}, "4 parts but 3 hashes"),
        ({"sampling": {"top_p": 2}}, "top_p"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_wrong_manifests_are_refused(changes: dict, where: str) -> None:
    with pytest.raises(ValueError, match=where):
        Manifest.model_validate(_broken(**changes))


def test_a_wrong_file_is_named_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_MANIFEST_DIR", str(tmp_path / "own"))
    write_manifest(tiny_manifest(), tmp_path / "own")
    path = tmp_path / "own" / "tiny.toml"
    good = path.read_text()
    assert manifest.find("tiny") == tiny_manifest()
    for text, reason in ((good.replace('"small"', '"huge"'), "wrong at tier"), (good[:40], "cannot be read")):
        path.write_text(text)
        with pytest.raises(UserError, match=reason) as raised:
            manifest.shipped()
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_sampling_defaults_become_a_sampling() -> None:
    sampling = manifest.find("qwen3-coder-next").sampling.sampling(max_tokens=9, seed=3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 0.95, 40)
    assert (sampling.max_tokens, sampling.seed) == (9, 3)


def test_the_wheel_carries_the_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), "."]
    if importlib.util.find_spec("hatchling"):
        command.insert(4, "--no-build-isolation")
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from lsp_agent.models import manifest as m; print(m.__file__, *(x.name for x in m.shipped()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "lsp_agent" / "models" / "manifest.py"), *SHIPPED]
    installed = tmp_path / "site" / "lsp_agent" / "manifests"
    assert tomllib.loads((installed / "qwen2.5-coder-1.5b.toml").read_text("utf-8"))["name"] == "qwen2.5-coder-1.5b"
