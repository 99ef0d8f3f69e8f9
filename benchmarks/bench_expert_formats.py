"""One layer of experts on the CPU in each format: time of a token, and what the kernel adds to the weights' error.

    python benchmarks/bench_expert_formats.py [--experts 64] [--rounds 60] [--threads 1]

Sizes of Qwen3-Coder-Next (hidden 2048, intermediate 512, 10 experts a token) with fewer experts, equal but apart in
memory; all formats in one process, interleaved, medians. `kernel error` compares with the same dequantised weights in
fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lsp_agent.engine.blocks import BlockFormat, Blocks, pack_zero_points
from lsp_agent.engine.graph import CONTRIB, IR_VERSION, OPSET, SWIGLU
from lsp_agent.engine.quantisation import EIGHT, FOUR, FOUR_ASYMMETRIC, HALF_FOUR, HALF_FOUR_ASYMMETRIC, MXFP4
from lsp_agent.engine.rounding import quantise

HIDDEN, WIDTH, USED = 2048, 512, 10
FORMATS = {
    "int4": FOUR,
    "int4, 16-bit scales": HALF_FOUR,
    "int4 asymmetric": FOUR_ASYMMETRIC,
    "int4 asymmetric, 16-bit scales": HALF_FOUR_ASYMMETRIC,
    "int4 block 128, 16-bit scales": BlockFormat(4, 128, half_scales=True),
    "int8": EIGHT,
    "int8, 16-bit scales": BlockFormat(8, 32, half_scales=True),
    "MXFP4 as int8": MXFP4,
}


def session_of(up: Blocks, down: Blocks, experts: int, threads: int) -> ort.InferenceSession:
    form, tensors, names = up.format, [], []
    for name, blocks, rows in (("up", up, 2 * WIDTH), ("down", down, HIDDEN)):
        arrays = {"codes": blocks.codes.reshape(experts, rows, -1), "scales": blocks.scales.reshape(experts, rows, -1)}
        if blocks.zero_points is not None:
            arrays["zeros"] = pack_zero_points(blocks.zero_points, form.bits).reshape(experts, rows, -1)
        tensors += [numpy_helper.from_array(array, f"{name}.{key}") for key, array in arrays.items()]
        names.append([f"{name}.{key}" if key in arrays else "" for key in ("codes", "scales", "zeros")])
    inputs = ["x", "logits", *names[0][:2], "", *names[1][:2], "", "", "", "", names[0][2], names[1][2]]
    node = helper.make_node(
        "QMoE", inputs if names[0][2] else inputs[:7], ["y"], domain=CONTRIB, k=USED, normalize_routing_weights=1,
        expert_weight_bits=form.bits, block_size=form.block, accuracy_level=4, **SWIGLU,
    )  # fmt: skip
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", HIDDEN), ("logits", experts))
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", HIDDEN])
    graph = helper.make_graph([node], "experts", values, [output], tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def repeated(blocks: Blocks, count: int) -> Blocks:
    """The matrix `count` times: experts that differ only in where they lie."""
    arrays = {name: getattr(blocks, name) for name in ("codes", "scales", "zero_points")}
    tiled = {n: None if a is None else np.tile(a, (count,) + (1,) * (a.ndim - 1)) for n, a in arrays.items()}
    return replace(blocks, **tiled)


def reference(up: Blocks, down: Blocks, x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The layer in fp32 for one token."""
    chosen = np.argsort(-logits[0])[:USED]
    mixing = np.exp(logits[0][chosen]) / np.exp(logits[0][chosen]).sum()
    total = np.zeros(HIDDEN, np.float32)
    up_values = up.dequantise().reshape(-1, 2 * WIDTH, HIDDEN)
    down_values = down.dequantise().reshape(-1, HIDDEN, WIDTH)
    for expert, share in zip(chosen, mixing, strict=True):
        both = up_values[expert] @ x[0]
        total += share * (down_values[expert] @ (both[0::2] / (1 + np.exp(-both[0::2])) * both[1::2]))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    up_values = random.standard_normal((2 * WIDTH, HIDDEN), np.float32) * np.float32(0.03)
    down_values = random.standard_normal((HIDDEN, WIDTH), np.float32) * np.float32(0.03)
    feeds = [
        {
            "x": random.standard_normal((1, HIDDEN), np.float32),
            "logits": random.standard_normal((1, arguments.experts), np.float32),
        }
        for _ in range(arguments.rounds)
    ]
    sessions, errors, times = {}, {}, {name: [] for name in FORMATS}
    for name, form in FORMATS.items():
        up, down = quantise(up_values, form), quantise(down_values, form)
        if form.element == "e2m1":
            up, down = up.widen(), down.widen()
        up, down = repeated(up, arguments.experts), repeated(down, arguments.experts)
        sessions[name] = session_of(up, down, arguments.experts, arguments.threads)
        expected = reference(up, down, **feeds[0])
        found = sessions[name].run(None, feeds[0])[0][0]
        errors[name] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    for feed in feeds:
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feed)
            times[name].append(time.perf_counter() - started)
    print("| format | bits a weight | µs a token and layer | kernel error |\n|---|---|---|---|")
    for name, form in FORMATS.items():
        microseconds = statistics.median(times[name]) * 1e6
        print(f"| {name} | {form.bits_a_weight:g} | {microseconds:.0f} | {errors[name]:.1e} |")


if __name__ == "__main__":
    main()
