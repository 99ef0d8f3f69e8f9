"""The delta rule is called in a session of its own: which one, with what, and what comes of it. On a CPU, which has no
such operator, models stand in for it that show their inputs."""

import numpy as np
import onnxruntime as ort
import pytest
from emulator import EmulatedKernels
from onnx import TensorProto, helper, numpy_helper

from lsp_agent.engine.architecture import LinearAttentionConfig
from lsp_agent.engine.gpu import split_delta
from lsp_agent.engine.gpu.operators import DOMAIN, Launcher, register
from lsp_agent.engine.gpu.split_delta import CHUNK, SplitDelta, covers

KERNELS = EmulatedKernels()
LINEAR = LinearAttentionConfig(2, 4, 8, 16, 4, ())
HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
PROVIDERS = ["CPUExecutionProvider"]


def stand_in(sign):
    """y is `sign` times v times the rate, the state grows by a_log + dt + the first step."""
    given, made = split_delta._values(LINEAR, "batch", "length")
    given, made = ([helper.make_tensor_value_info(*value) for value in part] for part in (given, made))
    nodes = [
        helper.make_node("Unsqueeze", ["rate", "last"], ["rates"]),
        helper.make_node("Cast", ["rates"], ["halves"], to=HALF),
        helper.make_node("Mul", ["v", "halves"], ["product"]),
        helper.make_node("Mul", ["product", "sign"], ["y"]),
        helper.make_node("Add", ["a_log", "dt"], ["gates"]),
        helper.make_node("ReduceSum", ["step", "second"], ["steps"], keepdims=0),
        helper.make_node("Add", ["gates", "steps"], ["more"]),
        helper.make_node("Unsqueeze", ["more", "two"], ["by_head"]),
        helper.make_node("Add", ["past", "by_head"], ["present"]),
    ]
    constants = {"last": [-1], "second": [1], "two": [2, 3]}
    tensors = [numpy_helper.from_array(np.array(values, np.int64), name) for name, values in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([sign], np.float16), "sign"))
    graph = helper.make_graph(nodes, "stand-in", given, made, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


@pytest.fixture
def delta(monkeypatch):
    monkeypatch.setattr(split_delta, "delta_model", lambda _: stand_in(1))
    kept = {}

    def constant(name, values):
        return kept.setdefault(name, np.ascontiguousarray(values)).ctypes.data

    made = SplitDelta(LINEAR, constant, "cpu", PROVIDERS)
    made.split = ort.InferenceSession(stand_in(-1), providers=PROVIDERS)
    made.kept = kept
    return made


def session(node):
    given = [("q", HALF, [None, None, 16]), ("k", HALF, [None, None, 16]), ("v", HALF, [None, None, 64])]
    given += [("step", SINGLE, [None, None, 4]), ("rate", SINGLE, [None, None, 4]), ("past", SINGLE, [None, 4, 16, 8])]
    made = [("y", HALF, [None, None, 64]), ("present", SINGLE, [None, 4, 16, 8])]
    given, made = ([helper.make_tensor_value_info(*value) for value in part] for part in (given, made))
    options = ort.SessionOptions()
    register(options, Launcher("CPUExecutionProvider", KERNELS.launcher, 0, KERNELS.error_string))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "g", given, made), opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)


def feeds(batch, length):
    random = np.random.default_rng(length)
    shapes = {"q": 16, "k": 16, "v": 64, "step": 4, "rate": 4}
    made = {name: random.standard_normal((batch, length, width)) for name, width in shapes.items()}
    made["past"] = random.standard_normal((batch, 4, 16, 8))
    return {name: values.astype(np.float16 if name in "qkv" else np.float32) for name, values in made.items()}


def expected(given, sign, gates):
    batch, length, _ = given["v"].shape
    by_head = given["v"].reshape(batch, length, 4, 16) * given["rate"].astype(np.float16)[..., None] * np.float16(sign)
    return by_head.reshape(batch, length, 64), given["past"] + (gates + given["step"].sum(axis=1))[:, :, None, None]


@pytest.mark.parametrize(("batch", "length", "sign"), [(1, CHUNK, 1), (1, CHUNK + 1, -1), (2, 3, 1), (3, 100, -1)])
def test_prompts_of_several_chunks_are_split(delta, batch, length, sign):
    random = np.random.default_rng(0)
    layers = [[random.standard_normal(4).astype(np.float32) for _ in range(2)] for _ in range(2)]
    names = ["q", "k", "v", "step", "rate", "past"]
    made = [session(delta.node(f"blk.{index}", names, ["y", "present"], *gates)) for index, gates in enumerate(layers)]
    for run, (a_log, dt) in zip(made, layers, strict=True):
        given = feeds(batch, length)
        y, present = run.run(None, given)
        wanted_y, wanted_present = expected(given, sign, a_log + dt)
        np.testing.assert_allclose(y, wanted_y, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(present, wanted_present, rtol=1e-4, atol=1e-4)


def test_a_gpu_that_cannot_split_goes_on_without(delta):
    class Fails:
        def io_binding(self):
            return ort.InferenceSession(stand_in(1), providers=PROVIDERS).io_binding()

        def run_with_iobinding(self, *_):
            raise RuntimeError("too little shared memory")

    delta.split = Fails()
    gates = np.zeros(4, np.float32)
    run = session(delta.node("blk.0", ["q", "k", "v", "step", "rate", "past"], ["y", "present"], gates, gates))
    given = feeds(1, 200)
    for _ in range(2):
        np.testing.assert_allclose(run.run(None, given)[0], expected(given, 1, gates)[0], rtol=2e-3, atol=1e-6)
    assert delta.split is None


def test_the_engine_is_chosen_for_one_session_only(monkeypatch):
    seen = []

    def made(*_, **__):
        seen.append(split_delta.os.environ.get("ORT_GDN_PLAN"))

    monkeypatch.setattr(split_delta.ort, "InferenceSession", made)
    monkeypatch.delenv("ORT_GDN_PLAN", raising=False)
    SplitDelta(LINEAR, lambda *_: 0, "cpu", PROVIDERS)
    assert seen == [None, "chunked_split"] and "ORT_GDN_PLAN" not in split_delta.os.environ
    assert covers(LinearAttentionConfig(16, 32, 128, 128, 4, ())) and not covers(LINEAR)
