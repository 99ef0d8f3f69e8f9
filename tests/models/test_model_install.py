"""`lsp_agent.models.install`: whole or not at all, next to other processes, after kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import CONTENT, PART, Hub, Log, tiny_manifest, write_manifest, write_runnable_gguf

from lsp_agent import paths
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import install, store
from lsp_agent.models.manifest import Manifest

# Another process that pulls the tiny model with an importer as slow as its argument says.
PULL = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    from tiny_model import Log
    from lsp_agent.models import install

    def importer(source, package, *, scheme, on_progress):
        package.mkdir()
        (package / "half").write_bytes(b"1")
        print("importing", flush=True)
        time.sleep(float(sys.argv[2]))
        (package / "weights.bin").write_bytes(source.read_bytes())

    log = Log()
    print("new" if install.pull("tiny", log, importer=importer)[1] else "there", log.text)
    """
)


def copy_in(source: Path, package: Path, *, scheme: object, on_progress: Callable[[int, int], None]) -> None:
    package.mkdir()
    (package / "weights.bin").write_bytes(source.read_bytes())
    on_progress(1, 1)


def start_pull(seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PULL, str(Path(__file__).parent), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def everything(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_pull_installs_once(tiny: Manifest, hub: Hub, log: Log) -> None:
    model, new = install.pull("tiny", log, importer=copy_in)
    assert new
    assert (model.path / "weights.bin").read_bytes() == CONTENT
    assert store.installed() == [model] == [store.resolve("tiny")]
    assert model.manifest == tiny
    assert "licence MIT" in log.text
    assert everything(paths.cache_dir()) == {"models/tiny/weights.bin", "models/tiny/manifest.json"}
    assert install.pull("tiny", log, importer=copy_in) == (model, False)
    assert len(hub.ranges) == 1


def test_keep_source_keeps_the_gguf_in_the_package(tiny: Manifest, hub: Hub, log: Log) -> None:
    model, _ = install.pull("tiny", log, keep_source=True, importer=copy_in)
    assert (model.path / "source.gguf").read_bytes() == CONTENT
    assert everything(paths.cache_dir() / "downloads") == set()


def test_unknown_names_get_suggestions(tiny: Manifest, log: Log) -> None:
    for call in (lambda: install.pull("tyni", log), lambda: store.resolve("tyni")):
        with pytest.raises(UserError, match="did you mean tiny") as raised:
            call()
        assert raised.value.exit_code == ExitCode.USAGE


def test_models_this_version_cannot_run_say_so_before_any_download(
    tiny: Manifest, hub: Hub, log: Log, tmp_path: Path
) -> None:
    alien = tiny.model_copy(update={"name": "alien", "architecture": "mamba"})
    write_manifest(alien, tmp_path / "manifests")
    for call in (lambda: install.pull("alien", log), lambda: store.resolve("alien")):
        with pytest.raises(UserError, match=r"cannot run yet.*architecture.*tiny"):
            call()
    assert hub.ranges == []


def test_a_full_disk_is_found_before_the_download(
    tiny: Manifest, hub: Hub, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=install.DISK_MARGIN_BYTES + 1_200_000)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"needs 0\.3 GB of disk.*LSP_AGENT_CACHE_DIR"):
        install.pull("tiny", log, importer=copy_in)
    assert hub.ranges == []
    # With most of it fetched already the same disk is enough.
    (paths.cache_dir() / "downloads").mkdir()
    (paths.cache_dir() / "downloads" / "tiny.gguf.partial").write_bytes(CONTENT[: 2 * PART])
    monkeypatch.setattr(install, "DISK_MARGIN_BYTES", install.DISK_MARGIN_BYTES - 100_000)
    assert install.pull("tiny", log, importer=copy_in)[1]


def test_a_disk_that_fills_up_leaves_no_model(tiny: Manifest, hub: Hub, log: Log) -> None:
    def full(source: Path, package: Path, *, scheme: object, on_progress: object) -> None:
        package.mkdir()
        (package / "weights.bin").write_bytes(b"some")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; free some disk"):
        install.pull("tiny", log, importer=full)
    assert store.installed() == []
    assert everything(paths.cache_dir()) == {"downloads/tiny.gguf"}  # verified: the next pull need not fetch it
    assert install.pull("tiny", log, importer=copy_in)[1]
    assert len(hub.ranges) == 1


def test_a_read_only_cache_folder_is_one_sentence(tiny: Manifest, log: Log) -> None:
    paths.cache_dir().write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written.*LSP_AGENT_CACHE_DIR"):
        install.pull("tiny", log, importer=copy_in)


def test_of_two_pulls_at_once_one_waits_and_finds_it(tiny: Manifest, hub: Hub) -> None:
    processes = [start_pull(1.0), start_pull(1.0)]
    answers = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(answer.count("importing") for answer in answers) == 1
    assert sum("new" in answer for answer in answers) == 1
    assert any("there" in answer and "waiting" in answer for answer in answers)
    assert len(hub.ranges) == 1
    assert (store.resolve("tiny").path / "weights.bin").read_bytes() == CONTENT


def test_kill_9_in_the_download_loses_nothing(tiny: Manifest, hub: Hub, log: Log) -> None:
    hub.delay_s = 0.1
    process = start_pull(0)
    partial = paths.cache_dir() / "downloads" / "tiny.gguf.partial"
    wait_for(lambda: partial.exists() and partial.stat().st_size > 30_000)
    process.kill()
    process.wait()
    kept = partial.stat().st_size
    assert partial.read_bytes() == CONTENT[:kept]
    assert store.installed() == []
    hub.delay_s = 0
    assert install.pull("tiny", log, importer=copy_in)[1]
    assert hub.ranges == [0, kept]


def test_kill_9_in_the_import_leaves_no_model(tiny: Manifest, hub: Hub, log: Log) -> None:
    process = start_pull(60)
    assert process.stdout
    assert process.stdout.readline() == "importing\n"
    process.kill()
    process.wait()
    assert store.installed() == []
    with pytest.raises(UserError, match="model pull tiny"):
        store.resolve("tiny")
    assert install.pull("tiny", log, importer=copy_in)[1]
    assert len(hub.ranges) == 1
    assert everything(paths.cache_dir()) == {"models/tiny/weights.bin", "models/tiny/manifest.json"}


def test_ctrl_c_keeps_what_was_fetched_and_says_cancelled(tiny: Manifest, hub: Hub) -> None:
    hub.delay_s = 0.1
    command = [sys.executable, "-m", "lsp_agent", "model", "pull", "tiny"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    partial = paths.cache_dir() / "downloads" / "tiny.gguf.partial"
    wait_for(lambda: partial.exists() and partial.stat().st_size > 30_000)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == ExitCode.CANCELLED, errors
    assert "Traceback" not in errors
    assert "cancelled" in errors
    assert partial.stat().st_size > 30_000
    assert store.installed() == []


def test_a_folder_without_a_manifest_is_no_model_and_is_replaced(tiny: Manifest, hub: Hub, log: Log) -> None:
    store.package_dir("tiny").mkdir(parents=True)
    (store.package_dir("tiny") / "manifest.json").write_text("{")
    assert store.installed() == []
    assert install.pull("tiny", log, importer=copy_in)[1]


def test_rm_frees_the_model_and_its_downloads(tiny: Manifest, hub: Hub, log: Log) -> None:
    install.pull("tiny", log, importer=copy_in)
    partial = paths.cache_dir() / "downloads" / "tiny.gguf.partial"
    partial.write_bytes(b"old")
    (paths.cache_dir() / "downloads" / "tiny.wheels").mkdir()
    (paths.cache_dir() / "downloads" / "tiny.wheels" / "a.whl").write_bytes(b"old")
    assert install.remove("tiny", log) >= len(CONTENT) + 6
    assert everything(paths.cache_dir()) == set()
    with pytest.raises(UserError, match="not installed, so there is nothing"):
        install.remove("tiny", log)
    with pytest.raises(UserError, match="no model called"):
        install.remove("../../etc", log)


def test_import_of_a_known_file_uses_its_manifest(tiny: Manifest, tmp_path: Path, log: Log) -> None:
    path = tmp_path / "download.gguf"
    path.write_bytes(CONTENT)
    model = install.import_model(path, None, log, importer=copy_in).model
    assert (model.name, model.manifest) == ("tiny", tiny)
    assert path.read_bytes() == CONTENT
    assert install.import_model(path, None, log, importer=copy_in) == install.Imported(model, new=False)
    other = install.import_model(path, "mine", log, importer=copy_in).model
    assert (other.name, other.manifest.title) == ("mine", "Tiny Model")


def test_a_corrected_manifest_counts_for_what_is_installed(
    tiny: Manifest, tmp_path: Path, hub: Hub, log: Log, make_gguf: Callable
) -> None:
    install.pull("tiny", log, importer=copy_in)
    write_manifest(tiny.model_copy(update={"memory_bytes": 7_000_000}), tmp_path / "manifests")
    assert store.resolve("tiny").manifest.memory_bytes == 7_000_000
    (tmp_path / "download.gguf").write_bytes(CONTENT)
    assert install.import_model(tmp_path / "download.gguf", None, log, importer=copy_in).new is False
    write_manifest(tiny_manifest(CONTENT[:-1]), tmp_path / "manifests")  # another file: what is installed stays itself
    assert store.resolve("tiny").manifest == tiny


def test_import_refuses_names_that_are_taken(tiny: Manifest, tmp_path: Path, log: Log, make_gguf: Callable) -> None:
    path = make_gguf(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="not the file known as tiny"):
        install.import_model(path, "tiny", log, importer=copy_in)
    with pytest.raises(UserError, match="cannot be a model's name"):
        install.import_model(path, "../tiny", log, importer=copy_in)
    install.import_model(path, "mine", log, importer=copy_in)
    known = tmp_path / "b.gguf"
    known.write_bytes(CONTENT)
    with pytest.raises(UserError, match="model rm mine"):
        install.import_model(known, "mine", log, importer=copy_in)


def test_import_describes_an_unknown_file_from_its_header(tmp_path: Path, log: Log, make_gguf: Callable) -> None:
    model = install.import_model(make_gguf(tmp_path / "x.gguf"), None, log, importer=copy_in).model
    manifest = model.manifest
    assert (model.name, manifest.title) == ("my-coder-9-instruct", "My Coder 9 (Instruct)")
    assert (manifest.architecture, manifest.context_length, manifest.license) == ("qwen2", 4096, "mit")
    assert (manifest.tier, manifest.parameters) == ("small", 64 * 32)
    assert manifest.fim
    assert manifest.fim.middle == "<|fim_middle|>"
    assert manifest.chat.format == "chatml"
    assert json.loads((model.path / "manifest.json").read_text())["name"] == model.name


def test_import_of_unusable_files_is_one_sentence(tmp_path: Path, log: Log, make_gguf: Callable) -> None:
    whole = make_gguf(tmp_path / "whole.gguf")
    content = whole.read_bytes()
    for number, damaged in enumerate([content[:-1000], content[:100], content[:6], b"", b"no model at all " * 99]):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"not a GGUF file|truncated or damaged") as raised:
            install.import_model(path, None, log, importer=copy_in)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no file"):
        install.import_model(tmp_path / "absent.gguf", None, log, importer=copy_in)
    with pytest.raises(UserError, match="'llama' are not supported"):
        install.import_model(make_gguf(tmp_path / "l.gguf", architecture="llama"), None, log, importer=copy_in)
    assert store.installed() == []


def test_the_real_importer_refuses_what_is_not_gguf(tiny: Manifest, hub: Hub, log: Log) -> None:
    with pytest.raises(UserError):
        install.pull("tiny", log)
    assert store.installed() == []
    assert not any(p for p in paths.models_dir().rglob("*") if p.is_file())


def test_an_imported_model_loads_and_generates(tmp_path: Path, log: Log) -> None:
    from lsp_agent.engine.engine import Engine

    imported = install.import_model(write_runnable_gguf(tmp_path / "real.gguf"), None, log)
    model = imported.model
    assert (model.name, imported.new) == ("tiny-qwen", True)
    assert store.resolve(None) == model
    assert "Importing tiny-qwen" in log.text
    assert log.done[-1] > 0
    assert log.done == sorted(log.done)
    engine = Engine.load(model.path, threads=1)
    prompt = engine.infill_prompt("def f", "return")
    steps = list(engine.generate(prompt, Sampling(max_tokens=3), CancelToken(), stop_ids=()))
    assert sum(1 for _ in steps) == 3


def test_what_the_importer_cannot_read_is_one_sentence(tmp_path: Path, log: Log) -> None:
    path = write_runnable_gguf(tmp_path / "real.gguf", merge="a z")  # makes a token that the vocabulary lacks
    with pytest.raises(UserError, match=r"real.gguf could not be imported \(.*vocabulary"):
        install.import_model(path, None, log)
    assert store.installed() == []


def test_the_real_model_installs_from_the_mirror(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches 0.5 GB of packages: only on request, with `LSP_AGENT_TEST_DOWNLOADS=1`."""
    if not os.environ.get("LSP_AGENT_TEST_DOWNLOADS"):
        pytest.skip("LSP_AGENT_TEST_DOWNLOADS is not set")
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    model, new = install.pull("qwen2.5-coder-0.5b", log)
    assert new
    assert store.resolve(None) == model


def test_manifests_of_the_user_replace_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tiny_manifest(name="qwen2.5-coder-0.5b"), tmp_path / "own")
    monkeypatch.setenv("LSP_AGENT_MANIFEST_DIR", str(tmp_path / "own"))
    with pytest.raises(UserError, match="not installed"):
        store.resolve("qwen2.5-coder-0.5b")
