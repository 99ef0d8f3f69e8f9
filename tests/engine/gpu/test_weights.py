"""Every weight of a package by its address, and the same memory in a session of ONNX Runtime."""

import threading

import numpy as np
import onnxruntime as ort
import pytest
from gguf import GGMLQuantizationType
from onnx import TensorProto, helper

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.cuda_graph import CudaGraph
from lsp_agent.engine.decoder import build_decoder
from lsp_agent.engine.embedding import Embedding
from lsp_agent.engine.gpu.expert_cache import state_type
from lsp_agent.engine.gpu.expert_memory import FIELDS
from lsp_agent.engine.gpu.expert_uses import load_uses, save_uses, uses_file
from lsp_agent.engine.gpu.memory import HostMemory, Load, view
from lsp_agent.engine.gpu.packing import pack_expert_codes
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.gpu.weights import DeviceWeights
from lsp_agent.engine.package import WEIGHTS, Experts, Extent, Linear, Package
from lsp_agent.errors import Cancelled

GATE_UP, DOWN = "blk.1.experts_gate_up", "blk.1.experts_down"


@pytest.fixture(scope="module")
def package(gpu_package):
    """`package(scheme)`: an imported package with experts."""
    return lambda scheme: gpu_package("qwen3-moe", scheme)


def at(address, shape, dtype):
    return view(address, int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)


@pytest.mark.parametrize("scheme", ["keep", "int4", "int4-asymmetric", "mxfp4"])
def test_every_matrix_and_vector_lies_at_its_address(package, scheme):
    one = package(scheme)
    weights = DeviceWeights(one, HostMemory())
    seen = set()
    for name, weight in one.weights.items():
        if isinstance(weight, Extent):
            np.testing.assert_array_equal(at(weights.address(name), weight.shape, "float32"), one.array(weight))
            seen.add(weights.address(name))
        elif isinstance(weight, Linear):
            for index, part in enumerate(weight.parts):
                arrays = {f".{field}": extent for field, extent in part.extents().items()}
                if part.values is not None:
                    arrays = {"": part.values}
                for field, extent in arrays.items():
                    wanted = one.array(extent)
                    dtype = np.uint8 if extent.dtype == "uint8" else np.float16
                    address = weights.address(f"{name}.{index}{field}")
                    np.testing.assert_array_equal(at(address, extent.shape, dtype), wanted.astype(dtype))
                    assert address % 256 == 0 and address not in seen
                    seen.add(address)
    assert len(seen) >= 16


@pytest.mark.parametrize("where", ["resident", "host"])
@pytest.mark.parametrize("scheme", ["int4", "int4-64", "int4-asymmetric", "int8", "mxfp4"])
def test_the_table_leads_to_each_experts_arrays(package, scheme, where):
    one = package(scheme)
    weights = DeviceWeights(one, HostMemory(), Placement(where))
    gate_up, down = one.weights[GATE_UP], one.weights[DOWN]
    assert isinstance(gate_up, Experts) and isinstance(down, Experts)
    columns = 6 if scheme == "int4-asymmetric" else 4
    table = at(weights.expert_table(GATE_UP, DOWN), (gate_up.count, columns), np.int64)
    for position, (experts, field) in enumerate(
        [(gate_up, "codes"), (gate_up, "scales"), (down, "codes"), (down, "scales"), (gate_up, "zero_points"),
         (down, "zero_points")][:columns]
    ):  # fmt: skip
        extent = experts.part.extents()[field]
        stored = one.array(extent).reshape(experts.count, len(one.array(extent)) // experts.count, -1)
        if field == "codes" and scheme != "mxfp4":
            stored = pack_expert_codes(stored, experts.part.format.bits)
        dtype = np.float16 if field == "scales" and scheme != "mxfp4" else np.uint8
        for expert in range(experts.count):
            found = at(int(table[expert, position]), stored.shape[1:], dtype)
            np.testing.assert_array_equal(found, stored[expert].astype(dtype), err_msg=f"{field} of {expert}")


@pytest.mark.parametrize("scheme", ["int4-asymmetric", "mxfp4"])
def test_slots_begin_with_the_experts_that_were_routed_most(package, scheme, monkeypatch, tmp_path):
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    one = package(scheme)
    count, parts = one.weights[DOWN].count, 6 if scheme == "int4-asymmetric" else 4

    def load():
        weights = DeviceWeights(one, HostMemory(), Placement("hybrid", 5))
        cache = weights.experts.cache(GATE_UP, DOWN)
        assert cache.slots == 5 and weights.expert_table(GATE_UP, DOWN) == cache.table
        kind = state_type(count, 5)
        return weights, cache, at(cache.state, (kind.itemsize,), np.uint8).view(kind)[0]

    first, _, state = load()
    assert list(state["expert_in"]) == [0, 1, 2, 3, 4]
    state["uses"][[7, 30, 2]], state["hits"], state["misses"] = (3, 9, 1), 10, 3
    counts = first.experts.counts()
    assert (counts.hits, counts.misses) == (10, 3) and counts.uses[GATE_UP][30] == 9
    first.remember()
    state["uses"][2] = 2
    first.remember()  # the run so far, not once more
    first.close()
    kept = load_uses(one)
    assert kept[GATE_UP][[7, 30, 2]].tolist() == [3, 9, 2]
    save_uses(one, {"blk.0.other": np.arange(count + 9)}, kept)  # of another model: it counts for nothing
    again, cache, state = load()
    assert list(state["expert_in"]) == [30, 7, 2, 0, 1] and not state["uses"].any()
    table, home = (at(address, (count, parts), np.int64) for address in (cache.table, cache.home))
    places = at(cache.places, (5, parts), np.int64)
    strides = [again.experts.tensors[f"{name}.{field}"].stride for name in (GATE_UP, DOWN) for field in FIELDS[:2]]
    strides += [again.experts.tensors[f"{name}.zero_points"].stride for name in (GATE_UP, DOWN)] if parts == 6 else []
    for slot, expert in enumerate(state["expert_in"]):
        np.testing.assert_array_equal(table[expert], places[slot])
        for part, stride in enumerate(strides):
            wanted = view(int(home[expert, part]), stride)
            assert wanted.any()
            np.testing.assert_array_equal(view(int(places[slot, part]), stride), wanted)
    others = state["slot_of"] == -1
    assert others.sum() == count - 5
    np.testing.assert_array_equal(table[others], home[others])


def failing(*_, **__):
    raise OSError("no room")


def test_counts_fade_and_damaged_files_count_for_nothing(package, monkeypatch, tmp_path):
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    one = package("int4")
    assert load_uses(one) == {}
    save_uses(one, {"a": np.array([4, 0, 2])}, {})
    save_uses(one, {"a": np.array([0, 1, 0])}, load_uses(one))
    np.testing.assert_array_equal(load_uses(one)["a"], [2, 1, 1])
    save_uses(one, {"a": np.array([1, 1])}, load_uses(one))  # other experts than before
    np.testing.assert_array_equal(load_uses(one)["a"], [1, 1])
    assert load_uses(package("int8")) == {}
    whole = uses_file(one).read_bytes()
    for damaged in (
        b"",
        b"damaged",
        whole[: len(whole) // 2],
        whole.replace(np.ones(2, np.float32).tobytes(), b"damaged!"),
    ):
        uses_file(one).write_bytes(damaged)
        assert load_uses(one) == {}
    assert [path.name for path in uses_file(one).parent.iterdir()] == [uses_file(one).name]
    monkeypatch.setattr(np, "savez", failing)
    save_uses(one, {"a": np.array([1, 1])}, {})
    assert [path.name for path in uses_file(one).parent.iterdir()] == [uses_file(one).name]


def test_dense_experts_are_kept_in_16_bits_but_have_no_table(package):
    one = package("keep")
    weights = DeviceWeights(one, HostMemory())
    extent = one.weights[DOWN].part.values
    stored = at(weights.address(DOWN), extent.shape, np.float16)
    np.testing.assert_array_equal(stored, one.array(extent).astype(np.float16))
    with pytest.raises(ValueError, match="not quantised"):
        weights.expert_table(GATE_UP, DOWN)


def test_layers_that_share_bytes_on_disk_do_not_share_memory(package):
    one = package("int4")
    shared = Package(one.path)
    shared.weights["blk.1.experts_down"] = shared.weights["blk.0.experts_down"]
    shared.weights["blk.1.attn_output"] = shared.weights["blk.0.attn_output"]
    weights = DeviceWeights(shared, HostMemory())
    for name in ("experts_down.codes", "attn_output.0.codes"):
        assert weights.address(f"blk.0.{name}") != weights.address(f"blk.1.{name}")


@pytest.mark.parametrize(("kind", "name"), [("float32", "f32"), ("float16", "f16")])
def test_the_embedding_keeps_its_rows(package, kind, name):
    one = package("keep" if kind == "float32" else "int4")
    weights = DeviceWeights(one, HostMemory())
    address, found = weights.embedding()
    assert found == name
    ids = np.array([3, 200])
    table = at(address, (one.config.vocabulary, one.config.hidden), kind)
    np.testing.assert_array_equal(table[ids].astype(np.float32), Embedding(one, "token_embd")(ids))


@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0"])
def test_an_embedding_in_blocks_becomes_fp16(tiny_package, kind):
    one = Package(tiny_package(GGMLQuantizationType[kind]))
    assert one.weights["token_embd"].type == kind
    weights = DeviceWeights(one, HostMemory())
    address, found = weights.embedding()
    assert found == "f16"
    ids = np.arange(one.config.vocabulary)
    table = at(address, (one.config.vocabulary, one.config.hidden), np.float16)
    np.testing.assert_array_equal(table, Embedding(one, "token_embd")(ids).astype(np.float16))


def test_constants_are_kept_once_for_each_name(package):
    weights = DeviceWeights(package("int4"), HostMemory())
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    address = weights.constant("zeros", values.T)
    np.testing.assert_array_equal(at(address, (3, 2), np.float32), values.T)
    assert weights.constant("zeros", values.T) == address != weights.constant("others", values.T)


def test_a_session_reads_the_same_memory(package):
    one = package("int4")
    weights = DeviceWeights(one, HostMemory())
    (part,) = one.weights["blk.0.attn_output"].parts
    columns, form = one.weights["blk.0.attn_output"].columns, part.format
    inputs = []
    for field, extent in (("codes", part.codes), ("scales", part.scales)):
        kind = TensorProto.UINT8 if field == "codes" else TensorProto.FLOAT16
        tensor = TensorProto(name=f"blk.0.attn_output.0.{field}", data_type=kind, dims=extent.shape)
        tensor.data_location = TensorProto.EXTERNAL
        nbytes = int(np.prod(extent.shape)) * (1 if field == "codes" else 2)
        for key, value in (("location", WEIGHTS), ("offset", 0), ("length", nbytes)):  # not where they lie
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        inputs.append(tensor)
    attributes = {"K": columns, "N": part.rows, "bits": form.bits, "block_size": form.block}
    node = helper.make_node(
        "MatMulNBits", ["x", *(t.name for t in inputs)], ["y"], domain="com.microsoft", **attributes
    )
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", None]) for name in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", [x], [y], inputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(one.path))
    kept = weights.share(model, options, "cpu")
    assert len(kept) == 2
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = np.random.RandomState(0).randn(3, columns).astype(np.float16)
    (found,) = session.run(None, {"x": values})
    matrix = one.blocks(part).dequantise()
    np.testing.assert_allclose(found, values.astype(np.float32) @ matrix.T, rtol=0.02, atol=0.02)
    scales = at(weights.address("blk.0.attn_output.0.scales"), part.scales.shape, np.float16)
    scales *= 2
    np.testing.assert_allclose(session.run(None, {"x": values})[0], 2 * found.astype(np.float32), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("scheme", ["keep", "int8", "int4", "int4-asymmetric", "mxfp4"])
def test_every_initialiser_of_the_gpus_graph_that_is_not_in_it_has_its_memory(package, scheme):
    one = package(scheme)
    graph = CudaGraph(one, 64, shared=True)
    build_decoder(architecture(one.config.architecture), one.config, graph)
    model, weights = graph.model(), DeviceWeights(one, HostMemory())
    sizes = weights.sizes()
    outside = [t for t in model.graph.initializer if t.external_data and t.name not in graph.in_memory]
    assert len(weights.share(model, ort.SessionOptions(), "cpu")) == len(outside) > 6
    for tensor in outside:
        itemsize = 2 if tensor.data_type == TensorProto.FLOAT16 else 1
        assert sizes[tensor.name] == np.prod(tensor.dims) * itemsize, tensor.name
    assert not any(values.nbytes > 1 << 20 for values in graph.in_memory.values())


def test_loading_tells_its_progress_and_stops_when_cancelled(package):
    one = package("int4")
    reports = []
    DeviceWeights(one, HostMemory(), on_progress=lambda done, total: reports.append((done, total)))
    done, totals = zip(*reports, strict=True)
    assert list(done) == sorted(done) and done[-1] == totals[0] and len(set(totals)) == 1
    cancel = CancelToken()
    cancel.cancel()
    threads = threading.active_count()
    memory = HostMemory()
    with pytest.raises(Cancelled):
        DeviceWeights(one, memory, cancel=cancel)
    assert not memory.held
    assert threading.active_count() == threads


@pytest.mark.parametrize("change", ["copy", "half", "pack4", "pack8"])
def test_pieces_add_up_to_the_whole(change):
    random = np.random.RandomState(1)
    source = (
        random.randn(100, 7).astype(np.float32) if change == "half" else random.randint(0, 256, (40, 128), np.uint8)
    )
    memory = HostMemory()
    first, second = memory.allocate([source.nbytes] * 2)
    whole = Load(source, first, change)
    whole.apply(view(whole.address, whole.nbytes))
    pieces = Load(source, second, change)
    count = 0
    for piece in pieces.pieces(1000):
        piece.apply(view(piece.address, piece.nbytes))
        count += 1
    assert count > 2
    np.testing.assert_array_equal(view(pieces.address, pieces.nbytes), view(whole.address, whole.nbytes))
