"""Bandwidths are read or measured, and a plan names the GPU that is there."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from fake_cupy import fake_cupy, install

from lsp_agent.cli import app
from lsp_agent.engine.gpu import bandwidth
from lsp_agent.engine.gpu.bandwidth import describe_machine, measure_machine


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(bandwidth, "COPIED_BYTES", 1 << 20)


def test_the_memorys_bandwidth_is_read_off_the_gpu():
    found = describe_machine(fake_cupy())
    assert found.name == "NVIDIA H100 80GB HBM3" and found.measured
    assert found.gpu == pytest.approx(3.352e12, rel=1e-3), "as NVIDIA says: 3.35 TB/s"
    assert found.bus > 1e8


def test_everything_is_measured_for_a_benchmark(monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: float(next(seconds)))
    found = measure_machine(fake_cupy(), threads=2)
    assert (found.gpu, found.bus, found.host) == (2 * 4 * 2**20, 2**20, 2 * 2**20), "bytes read and written in a second"
    alone = measure_machine(None, threads=1)
    assert alone.name == "CPU" and alone.gpu == alone.host == 2 * 2**20


def test_a_plan_uses_the_gpus_free_memory_and_its_bandwidth(monkeypatch):
    install(monkeypatch, free=60 * 10**9)
    result = CliRunner().invoke(app, ["model", "plan", "qwen3-coder-next", "--json"], catch_exceptions=False)
    plan = json.loads(result.stdout)
    assert plan["free"] == 60 * 10**9 and plan["placement"] == "resident" and plan["speed"]["machine"]["measured"]
    result = CliRunner().invoke(app, ["model", "plan", "qwen3-coder-next", "--vram", "56GiB"], catch_exceptions=False)
    assert "NVIDIA H100 80GB HBM3, 3352 GB/s of its memory" in result.stdout and "measured here" in result.stdout
