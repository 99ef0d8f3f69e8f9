"""The decoder as an ONNX Runtime session: embeddings and a state in, logits and the next state out."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.cpu_graph import CpuGraph
from lsp_agent.engine.decoder import EMBEDDING, build_decoder
from lsp_agent.engine.embedding import Embedding
from lsp_agent.engine.graph import Accuracy
from lsp_agent.engine.package import Package
from lsp_agent.engine.state import State
from lsp_agent.errors import Cancelled, UserError

CANCEL_POLL_S = 0.05


class Decoder:
    """Runs tokens through the model and moves a `State` on."""

    def __init__(self, package: Package, threads: int, context: int, accuracy: Accuracy) -> None:
        self.config = package.config
        self._embed = Embedding(package, EMBEDDING)
        graph = CpuGraph(package, context, accuracy)
        build_decoder(architecture(self.config.architecture), self.config, graph)
        self.states = graph.states
        self._shared_memory = graph.in_memory  # the session reads it without owning it
        options = graph.session_options(threads)
        try:
            self._session = ort.InferenceSession(
                graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ORT raises its own untyped errors
            raise UserError(f"ONNX Runtime cannot load {package.path} ({error}); import the model again.") from error

    @property
    def recurrent(self) -> bool:
        """Whether a part of the state cannot go back by any number of tokens."""
        return not all(spec.growing for spec in self.states)

    def run(self, ids: np.ndarray, state: State, rows: Sequence[int], cancel: CancelToken | None = None) -> np.ndarray:
        """Append `ids` [batch, length] to `state` and return logits [len(rows), vocabulary], fp32.

        `rows` index the batch * length positions. The caller counts the tokens (`state.extend`).
        Raises `Cancelled` within a few operators of `cancel`; the state is then as before.
        """
        batch, length = ids.shape
        total = state.length + length
        binding = state.binding(self._session)
        inputs = {  # the binding borrows these arrays, so they must outlive the run
            "embeddings": self._embed(ids.reshape(-1)).reshape(batch, length, -1),
            "lengths": np.full(batch, total - 1, np.int32),
            "total_length": np.array([total], np.int32),
            "rows": np.asarray(rows, np.int64),
        }
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        logits = np.empty((len(rows), self.config.vocabulary), np.float32)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits[None]))
        options = ort.RunOptions()
        done = threading.Event()
        watcher = _terminate_on_cancel(options, cancel, done) if cancel is not None and length > 1 else None
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception:
            if cancel is not None and cancel.cancelled:
                raise Cancelled from None
            raise
        finally:
            done.set()
            if watcher is not None:
                watcher.join()
        state.commit()
        return logits


def _terminate_on_cancel(options: ort.RunOptions, cancel: CancelToken, done: threading.Event) -> threading.Thread:
    def watch() -> None:
        while not done.is_set():
            if cancel.wait(CANCEL_POLL_S):
                options.terminate = True
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
