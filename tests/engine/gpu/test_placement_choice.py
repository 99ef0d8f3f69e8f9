"""The placement that a machine gets, the sentences where nothing fits, and what speed is expected of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lsp_agent.engine import synthetic
from lsp_agent.engine.gpu.choice import Choice, Room, choose
from lsp_agent.engine.gpu.placement import Placement, placement_kind
from lsp_agent.engine.gpu.speed import Machine, estimate, expected_hits
from lsp_agent.engine.plan import make_plan, sizes_of
from lsp_agent.errors import UserError
from lsp_agent.models.manifest import find

GB = 10**9
CARDS = (85, 25, 14, 7, 5)
"""GPU memory, in GB, that gives each placement to Qwen3-Coder-Next."""
H100 = Machine("H100", 3.35e12, 50e9, 100e9)


def config(name: str):
    found = find(name).decoder_config()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def next_model() -> synthetic.Layout:
    return synthetic.layout(config("qwen3-coder-next"), "mxfp4")


@pytest.fixture(scope="module")
def dense_model() -> synthetic.Layout:
    return synthetic.layout(config("qwen2.5-coder-1.5b"), "int4")


def chosen(model, gpu: int, host: int = 100, context: int = 8192, **options) -> Choice:
    return choose(model, "it", context, Room(gpu * GB, host * GB), **options)


def test_less_memory_moves_experts_out_of_the_card(next_model):
    kinds = [chosen(next_model, gpu) for gpu in CARDS]
    assert [c.kind for c in kinds] == ["resident", "hybrid", "hybrid", "host", "cpu"]
    slots = [c.plan.placement.slots for c in kinds if c.plan]
    assert slots[0] == 512 > slots[1] > slots[2] > slots[3] == 10
    for choice, gpu in zip(kinds[:4], CARDS[:4], strict=True):
        assert choice.plan and choice.plan.needed <= gpu * GB
        more = sizes_of(next_model).slot
        assert choice.kind != "hybrid" or 0.97 * gpu * GB < choice.plan.needed + more <= 0.98 * gpu * GB + more
    assert kinds[0].reason == "" and "25.0 GB are free" in kinds[1].reason
    assert [c.plan.placement.chunk for c in kinds if c.plan] == [2048, 4096, 4096, 2048]


def test_a_little_short_of_resident_gives_up_earlier_prompts_first(next_model):
    full = make_plan(next_model, 65536)
    choice = choose(next_model, "it", 65536, Room(full.needed - 1, 100 * GB))
    assert choice.kind == "resident" and choice.plan and choice.plan.placement.prompts == 2


def test_experts_in_main_memory_must_fit_there(next_model):
    choice = chosen(next_model, 25, host=40)
    assert choice.kind == "cpu"
    assert choice.reason.startswith(
        "it needs 41.7 GB of main memory for its experts and 36.0 GB can be locked; use the"
    )
    with pytest.raises(UserError, match=r"41\.7 GB of main memory"):
        chosen(next_model, 25, host=40, wanted="host")


def test_what_would_fit_is_said(next_model, dense_model):
    with pytest.raises(
        UserError, match=r"needs 4\d\.\d GB of GPU memory with a context of 8192 .*25.0 GB are free; ch"
    ):
        chosen(next_model, 25, wanted="resident")
    with pytest.raises(UserError, match=r"; choose --placement host\."):
        chosen(next_model, 25, wanted="resident")
    with pytest.raises(UserError, match=r"even with all experts in main memory .*; use the CPU or a smaller model"):
        chosen(next_model, 5, wanted="host")
    long = chosen(dense_model, 4, context=32768)
    assert long.kind == "resident" and long.plan and long.plan.placement.prompts < 4
    short = choose(dense_model, "it", 32768, Room(int(3.5 * GB), GB * 64))
    assert short.kind == "cpu" and "choose a context of at most" in short.reason
    longest = int(short.reason.rstrip(".").rpartition(" ")[2])
    assert 1024 <= longest < 32768 and longest % 1024 == 0
    again = choose(dense_model, "it", longest, Room(int(3.5 * GB), GB * 64))
    assert again.kind == "resident" and choose(dense_model, "it", longest + 2048, Room(int(3.5 * GB), GB * 64)).reason


def test_a_placement_can_be_asked_for_and_must_make_sense(next_model, dense_model):
    assert chosen(next_model, 85, wanted="host").kind == "host"
    assert chosen(next_model, 85, wanted="hybrid").plan.placement.slots == 511
    assert chosen(next_model, 85, wanted="cpu").plan is None
    with pytest.raises(UserError, match="no experts to place"):
        chosen(dense_model, 2, wanted="host")
    tiny = synthetic.layout(replace(next_model.config, experts=replace(next_model.config.experts, count=20)), "int4")
    with pytest.raises(UserError, match="too few experts to keep only some"):
        chosen(tiny, 85, wanted="hybrid")
    with pytest.raises(UserError, match="no placement 'disk'; choose one of resident, hybrid, host, cpu"):
        placement_kind("disk")
    assert placement_kind("hybrid") == "hybrid"


def test_answers_in_parallel_take_memory(next_model):
    one, four = make_plan(next_model, 8192), make_plan(next_model, 8192, batch=4)
    assert four.needed - one.needed > 4 * 8192 * 24_576
    longer = [make_plan(next_model, 65536, batch=batch).needed for batch in (1, 4)]
    assert longer[1] - longer[0] == four.needed - one.needed, "at the longest only one after another"
    assert four.bytes_a_token == one.bytes_a_token == 4 * 24_576


def test_speed_falls_with_what_crosses_the_bus(next_model):
    sizes = sizes_of(next_model)
    speeds = [estimate(chosen(next_model, gpu), sizes, H100, 1024) for gpu in CARDS]
    decode, prefill = [s.decode for s in speeds], [s.prefill for s in speeds]
    assert decode == sorted(decode, reverse=True) and prefill[0] > 4 * prefill[1] > prefill[3]
    assert speeds[0].host_bytes == 0 and 2.1e9 < speeds[0].gpu_bytes < 2.5e9, "2.24 GB a token by the model's numbers"
    assert speeds[3].host_bytes == 10 * sizes.slot and 40 < speeds[3].decode < 60, "49 tokens/s were measured"
    assert speeds[0].gpu_bytes == sum((speeds[3].gpu_bytes, speeds[3].host_bytes))
    again = estimate(chosen(next_model, 85, wanted="host"), sizes, H100, 1024, hits=0.5)
    assert again.host_bytes == 5 * sizes.slot, "of which the token before has fetched half"
    half = estimate(chosen(next_model, 25), sizes, H100, 1024, hits=0.5)
    assert half.host_bytes == 5 * sizes.slot and half.decode < decode[1] and half.prefill == prefill[1]
    far = estimate(chosen(next_model, 85), sizes, H100, 131072)
    assert far.gpu_bytes - speeds[0].gpu_bytes == 24_576 * (131072 - 1024) and far.decode < decode[0]


def test_expected_hits_are_those_of_the_trace():
    assert expected_hits(512, 512, 10) == 1.0
    assert 0.8 < expected_hits(100, 512, 10) < expected_hits(230, 512, 10) < 0.92
    assert expected_hits(4, 16, 2) == 0.25, "too few experts for a trace: evenly"
    kind = Placement("hybrid", 4)
    assert kind.prompts == 4 and kind.chunk == 2048
