"""Experts page in from a file that is packed for this machine, and any other file is replaced."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import onnxruntime as ort
import pytest
from gguf import GGMLQuantizationType as Type
from tiny_checkpoint import add_vocabulary, random_blocks, vocabulary

from lsp_agent.engine import prepacked
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.cpu_graph import CpuGraph
from lsp_agent.engine.decoder import build_decoder
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.expert_packing import weights_of
from lsp_agent.engine.package import Package
from lsp_agent.engine.session import Decoder
from lsp_agent.errors import UserError

CASES = [("qwen3-next", "int4"), ("qwen2-moe", "int8"), ("qwen3-moe", "int4")]
IDS = np.arange(5, 45)[None]


@pytest.fixture
def package(hf_package, tmp_path):
    """`package(name, scheme)`: a copy without a prepacked file."""

    def copy(name="qwen3-moe", scheme="int4"):
        target = tmp_path / f"{name}-{scheme}"
        shutil.copytree(hf_package(name, scheme), target, ignore=shutil.ignore_patterns("prepacked-*", ".prepack*"))
        return target

    return copy


def logits(folder):
    decoder = Decoder(Package(folder), 1, 64, "fast")
    return decoder.run(IDS, decoder.new_state(64), range(IDS.size))


def plain_logits(folder, monkeypatch):
    """What ONNX Runtime computes when it packs the experts into memory of its own."""
    with monkeypatch.context() as patch:
        patch.setattr("lsp_agent.engine.session.page_experts_in", lambda *_: None)
        return logits(folder)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if "prepack" in path.name and path.name != ".prepacked.lock")


def only_file(folder):
    [path] = folder.glob("prepacked-*.bin")
    return path


def graph(folder):
    opened = Package(folder)
    builder = CpuGraph(opened, 64, "fast")
    build_decoder(architecture(opened.config.architecture), opened.config, builder)
    return builder


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_same_logits_bit_for_bit(package, monkeypatch, name, scheme):
    folder = package(name, scheme)
    expected = plain_logits(folder, monkeypatch)
    assert not files(folder)
    for _ in range(2):  # made, then found
        np.testing.assert_array_equal(logits(folder), expected)
        assert [Path(file).suffix for file in files(folder)] == [".bin", ".json"]


def test_experts_come_from_the_file(package):
    """Other bytes in the packed weights, other logits: nothing is read from weights.bin behind our back."""
    folder = package()
    before = logits(folder)
    path = only_file(folder)
    index = path.with_suffix(".json")
    document = json.loads(index.read_text())
    content = document["content"]
    with path.open("r+b") as file:
        for weight in (entry for entry in content["weights"].values() if entry["blobs"]):
            offset, size = weight["blobs"][0]
            file.seek(offset)
            file.write(bytes(size // 2))
    content["mtime_ns"], content["samples"] = path.stat().st_mtime_ns, []
    index.write_text(json.dumps({"content": content, "sha256": prepacked._digest(content)}))
    assert not np.array_equal(logits(folder), before)


def test_a_stand_in_is_never_computed_with(package):
    """If ONNX Runtime finds no packed weights for a hash, a run fails; it must not use the stand-in."""
    builder = graph(folder := package())
    model = builder.model()
    prepacked.page_experts_in(model, folder)
    names = {name for node in model.graph.node if node.op_type == "QMoE" for name in weights_of(node)}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if tensor.name in names and entry.key == "prepacked_0":
                entry.value = re.sub(r"\+\d+", "+1", entry.value)
    decoder = Decoder(Package(folder), 1, 64, "fast")
    decoder._session = ort.InferenceSession(
        model.SerializeToString(), builder.session_options(1), providers=["CPUExecutionProvider"]
    )
    with pytest.raises(Exception, match="expected to have shape"):
        decoder.run(IDS, decoder.new_state(64), [0])


def flip(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def flip_unnoticed(path):
    """As a disk does it: the time of the last change stays. A page that is sampled."""
    document = json.loads(path.with_suffix(".json").read_text())
    offset = document["content"]["samples"][-1][0]
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        page = file.read(64)
        file.seek(offset)
        file.write(bytes(byte ^ 255 for byte in page))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGE = {
    "a byte changed": flip,
    "a sampled page changed by the disk": flip_unnoticed,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "no data": lambda path: path.unlink(),
    "no index": lambda path: path.with_suffix(".json").unlink(),
    "another index": lambda path: path.with_suffix(".json").write_text('{"content": {}, "sha256": ""}'),
    "half an index": lambda path: os.truncate(path.with_suffix(".json"), 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(package, damage):
    folder = package()
    expected = logits(folder)
    path = only_file(folder)
    content = path.read_bytes()
    DAMAGE[damage](path)
    np.testing.assert_array_equal(logits(folder), expected)
    assert only_file(folder).name == path.name
    assert only_file(folder).read_bytes() == content


@pytest.mark.parametrize(
    "foreign",
    [
        ("lsp_agent.engine.prepacked._processor", lambda: "another processor"),
        ("lsp_agent.engine.prepacked.ort.__version__", "0.0.0"),
    ],
    ids=["processor", "version"],
)
def test_a_file_of_another_machine_is_replaced(package, monkeypatch, foreign):
    folder = package()
    expected = logits(folder)
    path = only_file(folder)
    monkeypatch.setattr(*foreign)
    np.testing.assert_array_equal(logits(folder), expected)
    assert only_file(folder).name != path.name


def test_weights_imported_anew_are_packed_anew(package):
    folder = package()
    first = logits(folder)
    opened = Package(folder)
    scales = opened.weights["blk.0.experts_down"].part.scales
    halved = opened.array(scales) / 2
    with (folder / "weights.bin").open("r+b") as file:
        file.seek(scales.offset)
        file.write(halved.astype(scales.dtype).tobytes())
    assert not np.array_equal(logits(folder), first)


def run(folder, code, **options):
    """A Python process that has `folder` as a `Path`."""
    setup = "import sys; from pathlib import Path; from lsp_agent.engine.session import Decoder; "
    setup += "from lsp_agent.engine.package import Package; folder = Path(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", setup + code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


LOAD = "Decoder(Package(folder), 1, 64, 'fast'); print('loaded')"


def test_concurrent_first_loads_make_one_file(package, monkeypatch):
    folder = package()
    expected = plain_logits(folder, monkeypatch)
    processes = [run(folder, LOAD) for _ in range(4)]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (output, process.returncode) == ("loaded\n", 0), errors
    assert [Path(file).suffix for file in files(folder)] == [".bin", ".json"]
    np.testing.assert_array_equal(logits(folder), expected)


KILLED_AFTER = """
import os, signal
from lsp_agent.engine import prepacked
def progress(done, total):
    os.kill(os.getpid(), signal.SIGKILL)
Decoder(Package(folder), 1, 64, 'fast', on_progress=progress)
"""


def test_a_kill_while_it_is_made_leaves_nothing_half(package, monkeypatch):
    folder = package()
    expected = plain_logits(folder, monkeypatch)
    process = run(folder, KILLED_AFTER)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not list(folder.glob("prepacked-*"))
    assert list(folder.glob(".prepacking-*"))  # it was under way
    np.testing.assert_array_equal(logits(folder), expected)
    assert not list(folder.glob(".prepacking-*"))


def test_kills_at_any_time_do_no_harm(package, monkeypatch):
    folder = package("qwen3-next")
    expected = plain_logits(folder, monkeypatch)
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        process = run(folder, "print('go', flush=True)\n" + LOAD)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate(timeout=60)
        np.testing.assert_array_equal(logits(folder), expected)
        for file in folder.glob("prepacked-*"):
            file.unlink()


def test_without_room_small_experts_stay_in_memory(package, monkeypatch, caplog):
    folder = package()
    expected = plain_logits(folder, monkeypatch)
    monkeypatch.setattr(prepacked.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 0))
    np.testing.assert_array_equal(logits(folder), expected)
    assert not files(folder)
    assert "GB are there" in caplog.text


def test_without_room_large_experts_are_refused(package, monkeypatch):
    folder = package()
    monkeypatch.setattr(prepacked.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 0))
    monkeypatch.setattr(prepacked.machine, "usable_memory", lambda: 1000)
    with pytest.raises(UserError, match="free space there"):
        Engine.load(folder, threads=1)


def test_dense_models_make_no_file(hf_package):
    folder = hf_package("qwen3", "int4")
    Engine.load(folder, threads=1)
    assert not files(folder)


def test_progress_counts_layers(package):
    folder, seen = package("qwen3-next"), []
    Decoder(Package(folder), 1, 64, "fast", on_progress=lambda *step: seen.append(step))
    layers = Package(folder).config.layers
    assert seen == [(done, layers) for done in range(1, layers + 1)]
    Decoder(Package(folder), 1, 64, "fast", on_progress=lambda *step: seen.append(step))
    assert len(seen) == layers


def wide_package(folder, experts):
    """Two layers of `experts` experts of 256 x 256 x 3 in Q4_0: 0.15 MB each when packed."""
    source = folder / f"{experts}.gguf"
    writer = gguf.GGUFWriter(source, "qwen3moe")
    hidden, heads, head = 256, 4, 64
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_key_length(head)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(hidden)
    add_vocabulary(writer)
    random = np.random.RandomState(0)

    def matrix(name, *shape):
        raw = random_blocks(Type.Q4_0, int(np.prod(shape[:-1])), shape[-1], random)
        writer.add_tensor(f"{name}.weight", raw.reshape(*shape[:-1], -1), raw_dtype=Type.Q4_0)

    def vector(name, size):
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    tokens, _ = vocabulary()
    matrix("token_embd", len(tokens), hidden)
    matrix("output", len(tokens), hidden)
    vector("output_norm", hidden)
    for layer in range(2):
        prefix = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(prefix + name, hidden, hidden)
        for name, size in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", head), ("attn_k_norm", head)):
            vector(prefix + name, size)
        writer.add_tensor(f"{prefix}ffn_gate_inp.weight", random.standard_normal((experts, hidden)).astype(np.float32))
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            matrix(prefix + name, experts, hidden, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    import_checkpoint(source, folder / str(experts))
    return folder / str(experts)


OWN_MEMORY = """
import re
decoder = Decoder(Package(folder), 1, 64, 'fast')
def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
import numpy as np
before = own()
decoder.run(np.array([[5, 6, 7]]), decoder.new_state(64), [0])
print(before, own())
"""
WITHOUT = "import lsp_agent.engine.session as session; session.page_experts_in = lambda *_: None\n"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_own_memory_does_not_grow_with_the_experts(tmp_path):
    memory = {}
    for experts in (16, 256):
        folder = wide_package(tmp_path, experts)
        run(folder, LOAD).communicate(timeout=60)
        assert only_file(folder)
        for name, setup in (("paged", ""), ("packed at load", WITHOUT)):
            output, errors = run(folder, setup + OWN_MEMORY).communicate(timeout=60)
            memory[name, experts] = [int(value) for value in output.split()] or pytest.fail(errors)
    for moment in (0, 1):  # after loading, and after a run
        growth = {name: memory[name, 256][moment] - memory[name, 16][moment] for name in ("paged", "packed at load")}
        assert growth["packed at load"] > 50e6, memory  # else this test measures nothing
        assert growth["paged"] < 8e6, memory


def mapping_flags(file):
    """What the kernel notes of each mapping of `file`, in two letters each."""
    text = Path("/proc/self/smaps").read_text()
    return [
        set(re.search(r"VmFlags: (.*)", entry)[1].split())
        for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text)
        if str(file) in entry.splitlines()[0]
    ]


@pytest.mark.parametrize(("limit", "advised"), [(0, True), (1 << 60, False)], ids=["large", "small"])
def test_a_large_read_ahead_is_bounded(package, monkeypatch, limit, advised):
    folder = package()
    device = folder.stat().st_dev
    if not Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").exists():
        pytest.skip("this file system has no read-ahead to look up")
    monkeypatch.setattr(prepacked, "_HUGE_PAGE", limit)
    decoder = Decoder(Package(folder), 1, 64, "fast")
    found = mapping_flags(only_file(folder))
    assert found
    assert all(({"hg", "rr"} <= flags) is advised for flags in found)
    assert decoder.run(IDS, decoder.new_state(64), [0]).shape == (1, decoder.config.vocabulary)
