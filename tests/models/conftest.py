"""A hub on loopback that serves the tiny model, and a folder of wheels that mirrors it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tiny_model import CONTENT, COUNT, PART, Hub, Log, tiny_manifest, write_manifest, write_wheel

from lsp_agent.engine.fim import QWEN_FIM
from lsp_agent.models.manifest import Manifest


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("LSP_AGENT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody answers
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """The tiny model, known to every process of the test."""
    manifest = tiny_manifest()
    write_manifest(manifest, tmp_path / "manifests")
    monkeypatch.setenv("LSP_AGENT_MANIFEST_DIR", str(tmp_path / "manifests"))
    return manifest


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A mirror that has every part."""
    folder = tmp_path / "wheels"
    for number in range(1, COUNT + 1):
        write_wheel(folder, number, CONTENT[(number - 1) * PART : number * PART])
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that answers."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            state.ranges.append(begin)
            state.paths.append(self.path)
            if state.status != 200:
                self.send_error(state.status)
                return
            begin = 0 if state.ignore_range else begin
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(state.content) - begin))
            self.end_headers()
            stop, state.stop_after = state.stop_after, None
            for at in range(begin, len(state.content), 10_000):
                if stop is not None and at >= stop:
                    self.close_connection = True
                    return
                try:
                    self.wfile.write(state.content[at : at + 10_000])
                except OSError:
                    return
                time.sleep(state.delay_s)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def make_gguf() -> Callable[..., Path]:
    """Write a small GGUF file with one matrix [64, 32] and the special tokens of fill-in-the-middle."""

    def make(path: Path, architecture: str = "qwen2") -> Path:
        writer = GGUFWriter(path, architecture)
        writer.add_name("My Coder 9 (Instruct)")
        writer.add_license("mit")
        writer.add_context_length(4096)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_token_list(["a", "b", *QWEN_FIM.values(), "<|endoftext|>"])
        writer.add_chat_template("{{ '<|im_start|>' }}")
        writer.add_tensor("token_embd.weight", np.ones((64, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make
