"""Memory and speed of importing a Qwen3-Next checkpoint at the real layer sizes of Qwen3-Coder-Next 80B-A3B.

Writes a synthetic checkpoint (hidden 2048, 512 experts of 512, vocabulary 151,936; few layers), imports it in another
process and samples that process's memory that is not a mapped file (RssAnon + RssShmem of /proc/PID/status).

    python benchmarks/bench_import.py --folder /tmp/bench --layers 4                # BF16, int4
    python benchmarks/bench_import.py --folder /tmp/bench --layers 2 --dtype fp8
    python benchmarks/bench_import.py --folder /tmp/bench --layers 48 --sparse      # only opens, checks and plans

The folder takes 3.3 GB a layer (FP8: half), 1.2 GB besides, and what the package takes; it is removed at the end.
`--sparse` writes no data: a checkpoint of the full size whose headers are real.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, VOCABULARY, EXPERTS, EXPERT = 2048, 151_936, 512, 512
FULL_LAYERS = 48
SHARD_BYTES = 4_000_000_000
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_next", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 5120,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 262_144,
    "partial_rotary_factor": 0.25, "rope_theta": 5_000_000, "rms_norm_eps": 1e-6, "num_experts": EXPERTS,
    "num_experts_per_tok": 10, "moe_intermediate_size": EXPERT, "shared_expert_intermediate_size": EXPERT,
    "norm_topk_prob": True, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
}  # fmt: skip


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as in the published checkpoint."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        if layer % 4 == 3:
            for name, rows, columns in (
                ("q", 8192, HIDDEN),
                ("k", 512, HIDDEN),
                ("v", 512, HIDDEN),
                ("o", HIDDEN, 4096),
            ):
                yield f"{prefix}.self_attn.{name}_proj.weight", (rows, columns)
            yield f"{prefix}.self_attn.q_norm.weight", (256,)
            yield f"{prefix}.self_attn.k_norm.weight", (256,)
        else:
            yield f"{prefix}.linear_attn.in_proj_qkvz.weight", (12_288, HIDDEN)
            yield f"{prefix}.linear_attn.in_proj_ba.weight", (64, HIDDEN)
            yield f"{prefix}.linear_attn.conv1d.weight", (8192, 1, 4)
            yield f"{prefix}.linear_attn.A_log", (32,)
            yield f"{prefix}.linear_attn.dt_bias", (32,)
            yield f"{prefix}.linear_attn.norm.weight", (128,)
            yield f"{prefix}.linear_attn.out_proj.weight", (HIDDEN, 4096)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.mlp.gate.weight", (EXPERTS, HIDDEN)
        yield f"{prefix}.mlp.shared_expert_gate.weight", (1, HIDDEN)
        for expert in (*(f"experts.{index}" for index in range(EXPERTS)), "shared_expert"):
            yield f"{prefix}.mlp.{expert}.gate_proj.weight", (EXPERT, HIDDEN)
            yield f"{prefix}.mlp.{expert}.up_proj.weight", (EXPERT, HIDDEN)
            yield f"{prefix}.mlp.{expert}.down_proj.weight", (HIDDEN, EXPERT)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def entries(layers: int, dtype: str) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of each entry; published FP8 checkpoints keep these same parts in BF16."""
    for name, shape in tensors(layers):
        size = int(np.prod(shape))
        quantised = name.endswith("_proj.weight") or "in_proj_qkvz" in name
        if dtype == "fp8" and quantised:
            scales = (-(-shape[0] // 128), -(-shape[1] // 128))
            yield name, "F8_E4M3", shape, size
            yield f"{name}_scale_inv", "F32", scales, 4 * scales[0] * scales[1]
        else:
            yield name, "BF16", shape, 2 * size


def write_checkpoint(folder: Path, layers: int, dtype: str, sparse: bool) -> None:
    """Shards of about 4 GB; values are cut out of one block of random ones at random places."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    normal = (random.standard_normal(1 << 25, np.float32) * 0.02).view(np.uint32)
    block = {
        "BF16": (normal >> 16).astype(np.uint16).view(np.uint8),
        "F8_E4M3": random.integers(0, 0x70, 1 << 25, np.uint8) | (random.integers(0, 2, 1 << 25, np.uint8) << 7),
        "F32": random.uniform(1e-4, 3e-4, 1 << 20).astype(np.float32).view(np.uint8),
    }
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    filled = 0
    for entry in entries(layers, dtype):
        if filled + entry[3] > SHARD_BYTES:
            shards.append([])
            filled = 0
        filled += entry[3]
        shards[-1].append(entry)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, kind, shape, size in shard:
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
            end += size
            weight_map[name] = file
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            if sparse:
                out.truncate(8 + len(encoded) + end)
                continue
            for _, kind, _, size in shard:
                source = block[kind]
                while size:
                    start = int(random.integers(0, len(source) // 8)) * 4
                    size -= out.write(source[start : start + min(size, len(source) - start)].data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary: its size does not matter here."""
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel

    ids = {token: index for index, token in enumerate(sorted(ByteLevel.alphabet()))}
    Tokenizer(models.BPE(vocab=ids, merges=[])).save(str(folder / "tokenizer.json"))


def child(source: Path, package: Path, scheme: str, plan_only: bool) -> None:
    """Import, and print when each layer was done (seconds since the start)."""
    from lsp_agent.engine.checkpoints import importing
    from lsp_agent.engine.checkpoints.checkpoint import nbytes

    begin = time.perf_counter()
    plan = importing.ImportPlan(source, scheme)  # type: ignore[arg-type]
    result: dict[str, Any] = {"plan_s": time.perf_counter() - begin, "planned_bytes": plan.weights_bytes}
    if not plan_only:
        hashed = sum(file.stat().st_size for file in plan.checkpoint.files()) // importing.HASH_SHARE
        ends, done = {}, hashed
        for spec, of in plan.matched:
            done += sum(map(nbytes, of))
            ends[spec.name.split(".")[1] if spec.name.startswith("blk.") else spec.name] = done
        times: dict[str, float] = {}
        waiting = iter(ends.items())
        name, end = "hash", hashed - len(plan.checkpoint.files())

        def on_progress(done: int, _total: int) -> None:
            nonlocal name, end
            while done >= end and name not in times:
                times[name] = time.perf_counter() - begin
                name, end = next(waiting, (name, end))

        report = plan.run(package, on_progress)
        result |= {"times": times, "total_s": time.perf_counter() - begin, "package_bytes": report.package_bytes}
        result["cpu_s"] = time.process_time()
        result["weights_bytes"] = (package / "weights.bin").stat().st_size
        result["errors"] = {t.name: t.relative_rms_error for t in islice(report.tensors, 12)}
    print(json.dumps(result))


def memory_of(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Bytes that are no mapped file, and bytes of mapped files."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest}
    return fields.get("RssAnon", 0) + fields.get("RssShmem", 0), fields.get("RssFile", 0)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--scheme", default="int4")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source, package = arguments.folder / "checkpoint", arguments.folder / "package"
    if arguments.child:
        child(source, package, arguments.scheme, arguments.sparse)
        return
    try:
        write_checkpoint(source, arguments.layers, arguments.dtype, arguments.sparse)
        total = sum(path.stat().st_size for path in source.iterdir())
        print(f"checkpoint: {total / 1e9:.1f} GB, {len(list(source.glob('*.safetensors')))} shards", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak = files = 0
        while process.poll() is None:
            anonymous, mapped = memory_of(process)
            peak, files = max(peak, anonymous), max(files, mapped)
            time.sleep(0.02)
        assert process.stdout is not None and process.returncode == 0
        result = json.loads(process.stdout.read().splitlines()[-1])
        print(f"peak memory besides mapped files: {peak / 1e9:.2f} GB; of mapped files: {files / 1e9:.2f} GB")
        print(f"opened and planned in {result['plan_s']:.1f} s; package {result['planned_bytes'] / 1e9:.2f} GB")
        if "times" in result:
            assert result["weights_bytes"] == result["planned_bytes"]
            times = result["times"]
            marks = [times["token_embd"], *(times[str(layer)] for layer in range(arguments.layers))]
            layers = [after - before for before, after in pairwise(marks)]
            mean = sum(layers) / len(layers)
            rest = result["total_s"] - sum(layers) - times["hash"]
            print(f"seconds: {result['total_s']:.0f} = {total / result['total_s'] / 1e6:.0f} MB/s of the checkpoint")
            print(
                f"hashing {times['hash']:.0f}, each layer {', '.join(f'{x:.0f}' for x in layers)}, the rest {rest:.0f}"
            )
            hours = (times["hash"] / arguments.layers + mean) * FULL_LAYERS + rest
            print(f"processor time {result['cpu_s']:.0f} s, {result['cpu_s'] / arguments.layers:.0f} s a layer")
            print(f"extrapolated to {FULL_LAYERS} layers: {hours / 3600:.2f} h")
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
