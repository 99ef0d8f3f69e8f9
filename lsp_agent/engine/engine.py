"""The inference engine: a model package loaded into this process."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Message, Sampling, TokenScore, ToolSchema
from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.chat_prompt import ChatPrompt
from lsp_agent.engine.device import CpuDevice, Device, DeviceChoice, open_device, requested_device
from lsp_agent.engine.gpu.choice import Room, choose
from lsp_agent.engine.gpu.errors import in_use_by
from lsp_agent.engine.gpu.placement import PARALLEL, Placement
from lsp_agent.engine.graph import Accuracy
from lsp_agent.engine.package import Package
from lsp_agent.engine.plan import PARALLEL_CONTEXT
from lsp_agent.engine.prefixes.cache import PREFIX_SLOTS, PrefixCache
from lsp_agent.engine.prefixes.disk import open_disk
from lsp_agent.engine.prefixes.limits import disk_limit
from lsp_agent.engine.prepacked import Progress
from lsp_agent.engine.request import Request
from lsp_agent.engine.scheduling.generation import Generation, OnStep
from lsp_agent.engine.scheduling.scheduler import Scheduler
from lsp_agent.engine.scoring import Scoring
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.tokens import Tokenizer
from lsp_agent.errors import UserError
from lsp_agent.machine import default_threads, usable_memory

log = logging.getLogger(__name__)

CPU_ROWS = 8
"""Most sequences in one run on the CPU, of at most CPU_ROW_CONTEXT tokens each."""
CPU_ROW_CONTEXT = 32768


class Engine:
    """Generates and scores text. Requests come from any thread (`submit`); all else is for the one that runs it."""

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
        self.config: ModelConfig = package.config
        self.threads = threads
        self.tokenizer = Tokenizer(package)
        self._decoder = Decoder(package, threads, context, accuracy, device, on_progress, placement)
        prompts = placement.prompts if placement else PREFIX_SLOTS
        states, where = self._decoder.states, self._decoder.device
        disk = open_disk(package.path, f"{where.name} {accuracy}", states, disk_limit())
        self.prefixes = PrefixCache(states, context, prompts, where, disk=disk)
        row_capacity = min(context, PARALLEL_CONTEXT if self._decoder.device.name == "cuda" else CPU_ROW_CONTEXT)
        rows = PARALLEL if self._decoder.device.name == "cuda" else CPU_ROWS
        self.scheduler = Scheduler(self._decoder, self.prefixes, self.tokenizer, rows, row_capacity)

    @classmethod
    def load(
        cls,
        package: Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        accuracy: Accuracy = "fast",
        device: DeviceChoice | None = None,
        on_progress: Progress | None = None,
    ) -> Engine:
        """Load a package folder.

        `context`: most tokens of prompt and answer, at most (and by default) the model's own. `on_progress(done,
        total)`: layers whose experts are packed, which a machine's first load does. `device`: see `requested_device`;
        auto is the GPU where there is one that holds the model, and where loading succeeds, else the CPU.
        Raises `UserError` when the package is damaged or incomplete, or cannot run on that device.
        """
        opened = Package(package)
        length = min(context or opened.config.context, opened.config.context)
        wanted = requested_device(device)
        if wanted == "auto" and accuracy == "exact":
            wanted = "cpu"
        most = threads or default_threads()
        chosen = open_device(wanted)
        if chosen.name == "cuda":
            try:
                placement = _place(opened, package.name, length, chosen)
                engine = cls(opened, most, length, accuracy, chosen, on_progress, placement)
                engine.prepare()
                return engine
            except UserError as error:
                if wanted == "cuda":
                    raise
                log.warning("Running on the CPU: %s", error)
        return cls(opened, most, length, accuracy, CpuDevice(), on_progress)

    def close(self) -> None:
        """Before it is let go of, between requests: leave past prompts on disk, where that is asked for."""
        self.prefixes.close()

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.prefixes.capacity

    @property
    def placement(self) -> str:
        """Where it runs: `cpu`, or how its experts are placed on the GPU."""
        return self._decoder.placement

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The model's end tokens and the fill-in-the-middle tokens, none of which belong in an answer."""
        return frozenset({*self.tokenizer.end_ids, *self.tokenizer.fim.values()})

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        cancel: CancelToken,
        *,
        n: int = 1,
        stop_ids: Iterable[int] | None = None,
        drafting: bool = True,
    ) -> Generation:
        """Answer a prompt of token ids `n` times, decoded together after one reading of the prompt.

        Returns an iterator of `Step`s, in turn for each sequence that still runs, for the thread that runs the engine.
        `stop_ids`: by default this engine's. `drafting`: guess tokens from the text and verify several in one run,
        which changes the speed and, beyond rounding, nothing else. Raises `UserError` when the prompt is empty or does
        not fit; iterating raises `Cancelled`.
        """
        stops = self.stop_ids if stop_ids is None else frozenset(stop_ids)
        return self.submit(Request(prompt, sampling, cancel, n, stops, drafting=drafting))

    def submit(self, request: Request, on_step: OnStep | None = None) -> Generation:
        """See `Scheduler.submit`; from any thread, where `on_step` takes the steps."""
        return self.scheduler.submit(request, on_step)

    def prepare(self) -> None:
        """See `Decoder.prepare`; `load` does it."""
        self._decoder.prepare()

    def remember(self) -> None:
        """See `Decoder.remember`; between requests only."""
        self._decoder.remember()

    def infill_prompt(self, prefix: str, suffix: str) -> list[int]:
        """Token ids that ask for what belongs between `prefix` and `suffix`."""
        return self.tokenizer.infill(prefix, suffix)

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> ChatPrompt:
        """Tokens of a conversation that the assistant continues, perhaps by calling one of `tools`."""
        return self.tokenizer.chat(messages, tools)

    def scoring(self, ids: Sequence[int], cancel: CancelToken, top: int = 0) -> Scoring:
        """See `Scoring`."""
        return Scoring(self._decoder, self.prefixes, ids, cancel, top)

    def score(self, ids: Sequence[int], cancel: CancelToken) -> list[float]:
        """Natural-log probability of each of `ids[1:]` given all tokens before it."""
        scoring = self.scoring(ids, cancel)
        self.scheduler.drop_unwanted()
        try:
            while not scoring.done:
                if not scoring.advance() and not self.scheduler.make_room():
                    raise UserError("The engine has no state left to score with; wait until an answer is done.")
        finally:
            scoring.close()
        return scoring.scores

    def score_text(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        """`score` of a text, with the characters that each token covers."""
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        scores = self.score(ids, cancel)
        return [TokenScore(a, b, score) for (a, b), score in zip(offsets[1:], scores, strict=True)]


def _place(package: Package, name: str, context: int, device: Device) -> Placement:
    """Where the model goes on the GPU; raises `UserError` that says what would fit when it has no room."""
    choice = choose(package, name, context, Room(device.free_memory(), usable_memory()), batch=PARALLEL)
    if choice.plan is None:
        raise UserError(f"{choice.reason} {in_use_by()}".strip())
    log.info("%s on the GPU: %s. %s", name, choice.kind, choice.reason)
    return choice.plan.placement
