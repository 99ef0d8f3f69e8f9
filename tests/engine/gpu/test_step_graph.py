"""The decode graph for the GPU, whole, on emulated kernels: it says what the exact graph of the CPU says."""

import numpy as np
import onnxruntime as ort
import pytest
from emulator import EmulatedKernels
from gguf import GGMLQuantizationType as Type
from random_gguf import Sizes, random_gguf

from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.cuda_graph import CudaGraph
from lsp_agent.engine.decoder import build_decoder
from lsp_agent.engine.device import CpuDevice
from lsp_agent.engine.gpu.memory import HostMemory
from lsp_agent.engine.gpu.operators import Launcher, register
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.gpu.step_builder import StepBuilder
from lsp_agent.engine.gpu.step_graph import build_step
from lsp_agent.engine.gpu.steps import StepRunner
from lsp_agent.engine.gpu.weights import DeviceWeights
from lsp_agent.engine.package import Package
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import State

TOKENS = np.random.RandomState(3).randint(0, 256, 12).tolist()
CONTEXT = 64


class EmulatedDecoder:
    """Steps of a package on the CPU's provider, and states for them."""

    def __init__(self, package, kernels, placement=None):
        self.device, self._kernels, self._package = CpuDevice(), kernels, package
        graph = CudaGraph(package, CONTEXT)
        build_decoder(architecture(package.config.architecture), package.config, graph)
        self.states = graph.states
        self.weights = DeviceWeights(package, HostMemory(), placement)
        self.steps = StepRunner(self.device, package.config.vocabulary, 8, self._session)

    def _session(self, batch):
        graph = StepBuilder(self._package, self.states, self.weights, self._kernels, batch, CONTEXT)
        build_step(graph)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        launcher = Launcher("CPUExecutionProvider", self._kernels.launcher, 0, self._kernels.error_string)
        register(options, launcher)
        return ort.InferenceSession(graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"])

    def new_state(self, batch=1):
        return State(self.states, CONTEXT, batch, self.device)

    def read(self, tokens, state):
        """Logits [tokens, vocabulary] of tokens that are read one by one."""
        rows = []
        for token in tokens:
            (logits,) = self.steps.run([token], state)
            rows.append(logits.all())
            state.extend([token])
        return np.array(rows)


@pytest.fixture(scope="module")
def kernels():
    return EmulatedKernels()


@pytest.fixture(scope="module")
def decoder(gpu_package, kernels):
    return lambda name, scheme: EmulatedDecoder(gpu_package(name, scheme), kernels)


def exact(package, tokens):
    cpu = Decoder(package, 1, CONTEXT, "exact")
    return cpu.run(np.array([tokens]), cpu.new_state(CONTEXT), range(len(tokens)))


def assert_close(found, wanted, tolerance=0.02):
    """Nine of ten positions: fp16 activations may route a token between two near experts."""
    errors = np.abs(found - wanted).max(axis=-1) / np.abs(wanted).max()
    assert np.quantile(errors, 0.9) < tolerance
    assert np.corrcoef(found.reshape(-1), wanted.reshape(-1))[0, 1] > 0.999


@pytest.mark.parametrize("scheme", ["keep", "int8", "int4", "int4-64", "int4-asymmetric"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_dense_model_says_what_the_exact_graph_says(decoder, gpu_package, name, scheme):
    emulated = decoder(name, scheme)
    assert_close(emulated.read(TOKENS, emulated.new_state()), exact(gpu_package(name, scheme), TOKENS))


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-64", "int4-asymmetric", "mxfp4"])
@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-moe", "qwen3-next", "qwen3-next-top10"])
def test_a_mixture_says_what_the_exact_graph_says(decoder, gpu_package, name, scheme):
    emulated = decoder(name, scheme)
    assert_close(emulated.read(TOKENS, emulated.new_state()), exact(gpu_package(name, scheme), TOKENS))


@pytest.mark.parametrize("architecture_name", ["qwen2", "qwen3"])
def test_a_gguf_file_of_k_quants_says_what_the_exact_graph_says(kernels, tmp_path, architecture_name):
    """Blocks with corrections, of 4 and 5 bits, beside blocks of 16 columns, within one projection, too."""
    kinds = {"": Type.Q4_K, "attn_v": Type.Q6_K, "attn_k": Type.Q5_K, "ffn_up": Type.Q5_K, "ffn_down": Type.Q6_K}
    made = random_gguf(architecture_name, kinds | {"token_embd": Type.Q6_K}, sizes=Sizes(layers=2), tied=True)
    import_checkpoint(made.write(tmp_path / "k.gguf"), tmp_path / "package")
    package = Package(tmp_path / "package")
    emulated = EmulatedDecoder(package, kernels)
    assert_close(emulated.read(TOKENS, emulated.new_state()), exact(package, TOKENS))


@pytest.mark.parametrize("slots", [5, 40])
def test_experts_in_slots_say_the_same(gpu_package, kernels, slots):
    """With slots for few experts or for most."""
    package = gpu_package("qwen3-next-top10", "int4")
    emulated = EmulatedDecoder(package, kernels, Placement("hybrid", slots))
    assert_close(emulated.read(TOKENS, emulated.new_state()), exact(package, TOKENS))
    counts = emulated.weights.experts.counts()
    used = package.config.experts.used * package.config.layers * len(TOKENS)
    assert counts.hits + counts.misses == used == sum(uses.sum() for uses in counts.uses.values())
    assert counts.hits and counts.misses
