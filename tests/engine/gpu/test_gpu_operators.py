"""The operators in ONNX Runtime's CPU provider, with emulated kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from emulator import EmulatedKernels
from onnx import NodeProto, TensorProto, helper

from lsp_agent.engine.gpu import operators
from lsp_agent.engine.gpu.launch import Launch
from lsp_agent.engine.gpu.operators import Launcher, launch_node, library, register
from lsp_agent.errors import UserError

SIZE = 64
SCALE_SHIFT = Launch(str(Path(__file__).parent / "kernels" / "scale_shift"), (), (SIZE // 32, 1, 1), (32, 1, 1))
ABSENT = Launch(str(Path(__file__).parent / "kernels" / "absent"), (), (SIZE // 32, 1, 1), (32, 1, 1))
KERNELS = EmulatedKernels()
HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def session(
    nodes: Sequence[NodeProto], outputs: dict[str, int], launcher: Launcher | None = None
) -> ort.InferenceSession:
    """Over a graph of float inputs x and shift [SIZE]; every output is [SIZE] of its type."""
    values = [helper.make_tensor_value_info(name, SINGLE, [SIZE]) for name in ("x", "shift")]
    results = [helper.make_tensor_value_info(name, kind, [SIZE]) for name, kind in outputs.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(operators.DOMAIN, 1)]
    model = helper.make_model(helper.make_graph(nodes, "test", values, results), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    register(options, launcher or Launcher("CPUExecutionProvider", KERNELS.launcher, 0, KERNELS.error_string))
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def node(inputs: Sequence[str], outputs: Sequence[str], scale: np.ndarray, launch: Launch = SCALE_SHIFT) -> NodeProto:
    """`scale_shift`, whose outputs are f and h."""
    made = [(name, kind, [SIZE]) for name, kind in zip(outputs, "fh", strict=True)]
    return launch_node(launch, KERNELS.function(launch), inputs, made, [scale.ctypes.data])


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {name: generator.standard_normal(SIZE).astype(np.float32) for name in ("x", "shift")}


def test_chained_launches_pass_inputs_outputs_and_constants(feeds: dict[str, np.ndarray]) -> None:
    first, second = np.array([2], np.float32), np.array([-3], np.float32)
    nodes = [node(["x", "shift"], ["a", "a_half"], first), node(["a", "x"], ["b", "b_half"], second)]
    run = session(nodes, {"a_half": HALF, "b": SINGLE, "b_half": HALF})
    for _ in range(2):
        a_half, b, b_half = run.run(None, feeds)
        a = feeds["x"] * np.float32(2) + feeds["shift"]
        np.testing.assert_array_equal(a_half, a.astype(np.float16))
        np.testing.assert_array_equal(b, a * np.float32(-3) + feeds["x"])
        np.testing.assert_array_equal(b_half, b.astype(np.float16))
        first[0] = 2  # constants are addresses: read at each run
        feeds["x"] += 1


def test_constants_are_read_at_each_run(feeds: dict[str, np.ndarray]) -> None:
    scale = np.array([2], np.float32)
    run = session([node(["x", "shift"], ["y", "halves"], scale)], {"y": SINGLE})
    run.run(None, feeds)
    scale[0] = 5
    np.testing.assert_array_equal(run.run(None, feeds)[0], feeds["x"] * np.float32(5) + feeds["shift"])


def test_absent_inputs_and_outputs_are_null_pointers(feeds: dict[str, np.ndarray]) -> None:
    scale = np.array([2], np.float32)
    last = session([node(["x", ""], ["", "halves"], scale)], {"halves": HALF})
    np.testing.assert_array_equal(last.run(None, feeds)[0], (feeds["x"] * 2).astype(np.float16))
    first = session([node(["", "x", "", "shift"], ["y", "halves"], scale, ABSENT)], {"y": SINGLE})
    np.testing.assert_array_equal(first.run(None, feeds)[0], feeds["x"] - feeds["shift"] * 2)


def test_a_kernel_with_other_arguments_fails_the_run(feeds: dict[str, np.ndarray]) -> None:
    run = session([node(["x"], ["y", "halves"], np.ones(1, np.float32))], {"y": SINGLE})
    with pytest.raises(Exception, match=r"scale_shift: the launch failed with 1 \(it has 5 arguments, not 4"):
        run.run(None, feeds)


def test_a_launch_that_the_gpu_refuses_fails_the_run(feeds: dict[str, np.ndarray]) -> None:
    launch = Launch(SCALE_SHIFT.source, (), (1, 1, 1), (2048, 1, 1))
    run = session([node(["x", "shift"], ["y", "halves"], np.ones(1, np.float32), launch)], {"y": SINGLE})
    with pytest.raises(Exception, match=r"scale_shift: the launch failed with 1 .*2048 threads"):
        run.run(None, feeds)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("function", None, "function is missing"),
        ("grid", [1, 1], "grid must be three positive numbers"),
        ("block", [0, 1, 1], "block must be three positive numbers"),
        ("ranks", [1], "a number for each output"),
        ("ranks", [1, 2], "shapes and ranks do not fit"),
        ("ranks", [-1, 3], "shapes and ranks do not fit"),
    ],
)
def test_wrong_attributes_fail_the_session(attribute: str, value: object, reason: str) -> None:
    wrong = node(["x", "shift"], ["y", "halves"], np.ones(1, np.float32))
    kept = [entry for entry in wrong.attribute if entry.name != attribute]
    del wrong.attribute[:]
    wrong.attribute.extend(kept)
    if value is not None:
        wrong.attribute.append(helper.make_attribute(attribute, value))
    with pytest.raises(Exception, match=f"scale_shift: .*{reason}"):
        session([wrong], {"y": SINGLE})


def test_every_signature_is_registered() -> None:
    outputs = [("a", "i", [SIZE]), ("b", "f", [SIZE]), ("c", "h", [SIZE]), ("d", "f", [SIZE])]
    made = launch_node(SCALE_SHIFT, 1, ["x"], outputs)
    kinds = {"a": TensorProto.INT32, "b": SINGLE, "c": HALF, "d": SINGLE}
    types = {output.name: output.type for output in session([made], kinds).get_outputs()}
    assert types == {"a": "tensor(int32)", "b": "tensor(float)", "c": "tensor(float16)", "d": "tensor(float)"}


def test_a_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    library.cache_clear()
    with pytest.raises(UserError, match="needs a C compiler; install it with"):
        library()
    library.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "operators").touch()
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    library.cache_clear()
    with pytest.raises(UserError, match="cannot be kept in"):
        library()
    library.cache_clear()


def test_nothing_in_the_current_folder_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "ziglang.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    library.cache_clear()
    assert library().is_file()
    library.cache_clear()


def test_a_library_that_was_built_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    library.cache_clear()
    built = library()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    library.cache_clear()
    assert library() == built and built.is_file()
    library.cache_clear()
    code = f"import ctypes; ctypes.CDLL({str(built)!r}).RegisterCustomOps"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
