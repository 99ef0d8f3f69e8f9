"""The decode graph for the GPU, whole, on emulated kernels: it says what the exact graph of the CPU says."""

import numpy as np
import pytest
from emulated_decoder import EmulatedDecoder, assert_close, exact
from emulator import EmulatedKernels
from gguf import GGMLQuantizationType as Type
from random_gguf import Sizes, random_gguf

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.package import Package

TOKENS = np.random.RandomState(3).randint(0, 256, 12).tolist()


@pytest.fixture(scope="module")
def kernels():
    return EmulatedKernels()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("qwen2", "keep"),  # biases; 4 bits are below, in K-quants
        ("qwen2-moe", "int4-64"),  # a shared expert, shares of all experts
        ("qwen3-moe", "int8"),  # norms of queries and keys
        ("small", "int4"),  # Gated DeltaNet, gated attention, ten experts a token
        ("small", "int4-asymmetric"),
        ("small", "mxfp4"),
    ],
)
def test_every_layer_says_what_the_exact_graph_says(gpu_package, kernels, name, scheme):
    """All schemes of all models run on a GPU (`tests/gpu/test_cuda_graph.py`)."""
    package = gpu_package(name, scheme)
    emulated = EmulatedDecoder(package, kernels)
    assert_close(emulated.read(TOKENS, emulated.new_state()), exact(package, TOKENS))


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
    package = gpu_package("small", "int4")
    emulated = EmulatedDecoder(package, kernels, Placement("hybrid", slots))
    assert_close(emulated.read(TOKENS, emulated.new_state()), exact(package, TOKENS))
    counts = emulated.weights.experts.counts()
    used = package.config.experts.used * package.config.layers * len(TOKENS)
    assert counts.hits + counts.misses == used == sum(uses.sum() for uses in counts.uses.values())
    assert counts.hits and counts.misses
