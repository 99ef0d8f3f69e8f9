"""The decoder as an ONNX Runtime session: embeddings and a state in, logits and the next state out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.cpu_graph import CpuGraph
from lsp_agent.engine.decoder import EMBEDDING, build_decoder
from lsp_agent.engine.device import Array, CpuDevice, CudaDevice, Device, bind_input, bind_output
from lsp_agent.engine.drafting.replay import Replay
from lsp_agent.engine.drafting.verification import Verified
from lsp_agent.engine.embedding import Embedding
from lsp_agent.engine.gpu.errors import out_of_memory
from lsp_agent.engine.gpu.placement import PARALLEL
from lsp_agent.engine.graph import Accuracy
from lsp_agent.engine.package import Package
from lsp_agent.engine.prepacked import Progress, page_experts_in, read_in_huge_pages
from lsp_agent.engine.sampling import HostLogits, Logits
from lsp_agent.engine.state import State
from lsp_agent.errors import Cancelled, UserError

if TYPE_CHECKING:
    from lsp_agent.engine.gpu.placement import Placement
    from lsp_agent.engine.gpu.runtime import GpuRuntime
    from lsp_agent.engine.gpu.steps import StepRunner
    from lsp_agent.engine.scheduling.batch import Batch

CANCEL_POLL_S = 0.05
MOST_VERIFIED = 32
"""Ids that a run verifies: more would keep a cancelled request waiting, and a run is bound by arithmetic by then."""


class Decoder:
    """Runs tokens through the model and moves a `State` on."""

    def __init__(
        self,
        package: Package,
        threads: int,
        context: int,
        accuracy: Accuracy,
        device: Device | None = None,
        on_progress: Progress | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.config = package.config
        self.device: Device = device or CpuDevice()
        self._placement = placement
        self._gpu: GpuRuntime | None = None
        self._replay: Replay | None = None
        self._keep: object = None  # what the session reads without owning it
        gpu = self.device
        if isinstance(gpu, CudaDevice):
            if accuracy == "exact":
                raise UserError("Exact arithmetic is only possible on the CPU; leave the accuracy or the device out.")
            self._open(package, lambda: self._open_gpu(package, gpu, context, threads, placement, on_progress))
        else:
            self._open(package, lambda: self._open_cpu(package, context, threads, accuracy, on_progress))

    def _open(self, package: Package, load: Callable[[], None]) -> None:
        try:
            load()
        except (UserError, Cancelled):
            raise
        except Exception as error:  # ORT raises its own untyped errors
            if self.device.name == "cuda":
                reason = f"The GPU cannot load {package.path} ({error}); use the CPU (LSP_AGENT_DEVICE=cpu)."
                if out_of_memory(error):
                    reason = f"The GPU has too little free memory for {package.path}; free some, or use the CPU."
                raise UserError(reason) from error
            raise UserError(
                f"ONNX Runtime cannot load {package.path} ({error}); remove it with `lsp-agent model rm` and install "
                "it again."
            ) from error

    def _open_cpu(
        self, package: Package, context: int, threads: int, accuracy: Accuracy, on_progress: Progress | None
    ) -> None:
        graph = CpuGraph(package, context, accuracy)
        build_decoder(architecture(self.config.architecture), self.config, graph)
        self.states = graph.states
        self._embed: Callable[[np.ndarray], Array] = Embedding(package, EMBEDDING)
        self._element = np.dtype(graph.element)
        self._keep = graph.in_memory
        if graph.replayed:
            self._replay = Replay(package, threads, accuracy, graph.replayed)
        options, model = graph.session_options(threads), graph.model()
        paged = page_experts_in(model, package.path, on_progress) if accuracy == "fast" else None
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=self.device.providers({}))
        if paged:
            read_in_huge_pages(paged)

    def _open_gpu(
        self,
        package: Package,
        device: CudaDevice,
        context: int,
        threads: int,
        placement: Placement | None,
        on_progress: Progress | None,
    ) -> None:
        from lsp_agent.engine.gpu.runtime import GpuRuntime

        self._gpu = GpuRuntime(package, device, context, threads, placement, on_progress)
        self.states, self._session, self._embed = self._gpu.states, self._gpu.session, self._gpu.embed
        self._element = np.dtype(self._gpu.element)

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prompt that are read in one run, unless the caller wishes otherwise."""
        return self._placement.chunk if self._placement else self.device.prefill_chunk

    @property
    def placement(self) -> str:
        """`cpu`, or the kind of placement on the GPU."""
        return self._placement.kind if self._placement else "gpu" if self._gpu else "cpu"

    @property
    def recurrent(self) -> bool:
        """Whether a part of the state cannot go back by any number of tokens."""
        return not all(spec.growing for spec in self.states)

    def new_state(self, capacity: int) -> State:
        """An empty state in the device's memory."""
        return State(self.states, capacity, self.device)

    def run(
        self, ids: np.ndarray, state: State | Batch[Any], rows: Sequence[int], cancel: CancelToken | None = None
    ) -> np.ndarray:
        """Append `ids` [batch, length] to `state` and return logits [len(rows), vocabulary], fp32.

        `rows` index the batch * length positions. The caller counts the tokens (`state.extend`).
        Raises `Cancelled` within a few operators of `cancel`; the state is then as before.
        """
        logits = self._run(state.binding(self._session), ids, state, rows, cancel)
        state.commit()
        return logits

    def _run(
        self,
        binding: ort.IOBinding,
        ids: np.ndarray,
        state: State | Batch[Any],
        rows: Sequence[int],
        cancel: CancelToken | None = None,
        kept: int = 0,
    ) -> np.ndarray:
        """`run` without moving recurrent states on; of its positions the first `kept` can be replayed."""
        _, length = ids.shape
        ends = np.array(state.lengths, np.int32) + length
        wanted = len(rows)
        if self._gpu and not wanted:
            rows = [0]  # an output without elements has no address on the GPU
        device = self.device
        inputs: dict[str, np.ndarray] = {  # the binding borrows these arrays, so they must outlive the run
            "lengths": ends - 1,
            "rows": np.asarray(rows, np.int64),
        }
        if self._replay is not None:
            inputs[CpuGraph.kept] = np.array([kept], np.int64)
        borrowed: dict[str, Array] = {name: device.array(values) for name, values in inputs.items()}
        borrowed["embeddings"] = self._embed(ids)
        for name, array in borrowed.items():
            bind_input(device, binding, name, array)
        binding.bind_cpu_input("total_length", ends.max(keepdims=True))  # the kernels read it on the host
        logits = device.zeros((1, len(rows), self.config.vocabulary), self._element.name)
        bind_output(device, binding, "logits", logits)
        options: ort.RunOptions | None = None  # ONNX Runtime searches those that are given, which takes 0.1 ms
        done = threading.Event()
        if cancel is not None and length > 1:
            options = ort.RunOptions()
            _terminate_on_cancel(options, cancel, done)
        try:
            self._session.run_with_iobinding(binding, options)
            device.finish(binding)
        except Exception:
            if cancel is not None and cancel.cancelled:
                raise Cancelled from None
            raise
        finally:
            done.set()  # the watcher ends within its next poll; waiting for it would take as long
        return device.host(logits)[0, :wanted].astype(np.float32, copy=False)

    def step(self, tokens: Sequence[int], state: State | Batch[Any]) -> list[Logits]:
        """Append one token to each sequence of `state`; returns what each says next. See `run`."""
        steps = self._gpu.steps if self._gpu else None
        if steps is not None and steps.covers(len(tokens)):
            return steps.run(tokens, state)
        logits = self.run(np.array(tokens, np.int64)[:, None], state, range(len(tokens)))
        return [HostLogits(row) for row in logits]

    def prepare(self) -> None:
        """Make now what runs would make in the middle of an answer. See `StepRunner.prepare_all`."""
        if self._gpu is not None and self._gpu.steps is not None:
            self._gpu.steps.prepare_all(PARALLEL)

    @property
    def most_verified(self) -> int:
        """Most ids that `verify` takes; 1 where guesses cannot be verified."""
        if (steps := self._verifying) is not None:
            return steps.most_verified
        return 1 if self.recurrent and self._replay is None else MOST_VERIFIED

    @property
    def _verifying(self) -> StepRunner | None:
        """The GPU's kernels, if they verify."""
        steps = self._gpu.steps if self._gpu else None
        return steps if steps is not None and steps.most_verified > 1 else None

    def verify(self, ids: Sequence[int], state: State, cancel: CancelToken | None = None) -> Verified:
        """Read at most `most_verified` `ids` after a state, of which the caller accepts the first few.

        See `Verified`: whatever number is accepted, nothing is read again. Raises `Cancelled` as `run` does.
        """
        if not 0 < len(ids) <= self.most_verified:
            raise ValueError(f"cannot verify {len(ids)} ids, at most {self.most_verified}")
        if len(ids) == 1:
            return Verified(self.step(ids, state), lambda _: state.extend(ids))
        if (steps := self._verifying) is not None:
            return steps.verify(ids, state)
        state.begin()
        binding = self._session.io_binding()  # of its own: a binding of the state's would keep the outputs
        state.bind(binding)
        last = len(ids) - 1
        kept = self._replay.bind(binding, last) if self._replay is not None else {}
        logits = self._run(binding, np.array([ids], np.int64), state, range(len(ids)), cancel, kept=last)

        def accept(count: int) -> None:
            if not 0 < count <= len(ids):
                raise ValueError(f"cannot accept {count} of {len(ids)} ids")
            if self._replay is not None and count < len(ids):
                self._replay.run(state, kept, count)
            state.commit()
            state.extend(ids[:count])

        return Verified([HostLogits(row) for row in logits], accept)

    def follow(self, logits: np.ndarray) -> None:
        """Route single tokens by these logits, see `GpuRuntime.follow`; raises `UserError` where nothing can."""
        if self._gpu is None or self._gpu.steps is None:
            raise UserError("A trace steers the GPU's decode kernels, which do not run here; leave --trace out.")
        self._gpu.follow(logits)

    def remember(self) -> None:
        """Keep on disk what the next run can use: which experts were used most, where that matters."""
        if self._gpu is not None:
            self._gpu.remember()

    def expert_hits(self) -> tuple[int, int]:
        """See `GpuRuntime.expert_hits`; (0, 0) elsewhere."""
        return self._gpu.expert_hits() if self._gpu is not None else (0, 0)

    def rollback(self, state: State, count: int) -> None:
        """Forget the last `count` tokens of a state.

        A recurrent state goes back to before its last runs bit for bit, and else to the nearest length that it
        remembers, from where it reads the tokens again (in one run, which rounds differently from many).
        """
        if not 0 <= count <= state.length:
            raise ValueError(f"cannot forget {count} of {state.length} tokens")
        target, ids = state.length - count, list(state.ids)
        known = state.reachable(target)
        state.truncate(known)
        if known < target:
            self.run(np.array([ids[known:target]], np.int64), state, [])
            state.extend(ids[known:target])


def _terminate_on_cancel(options: ort.RunOptions, cancel: CancelToken, done: threading.Event) -> None:
    def watch() -> None:
        while not done.is_set():
            if cancel.wait(CANCEL_POLL_S):
                options.terminate = True
                return

    threading.Thread(target=watch, daemon=True).start()
