"""Asking for a GPU where there is none, and for devices that do not exist."""

import sys

import pytest

from lsp_agent.engine import device
from lsp_agent.engine.device import CpuDevice, open_device
from lsp_agent.engine.engine import Engine
from lsp_agent.errors import UserError


def test_the_environment_chooses_a_device(monkeypatch):
    monkeypatch.delenv("LSP_AGENT_DEVICE", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert isinstance(open_device(), CpuDevice), "auto is the CPU where there is no GPU"
    monkeypatch.setenv("LSP_AGENT_DEVICE", "gpu")
    with pytest.raises(UserError, match="no device 'gpu'; set LSP_AGENT_DEVICE to auto, cpu or cuda"):
        open_device()
    assert isinstance(open_device("cpu"), CpuDevice)


def test_without_the_gpus_packages_one_sentence_says_what_to_install(monkeypatch, tiny_package):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match=r"install them with pip install 'lsp-agent\[gpu\]'"):
        Engine.load(tiny_package(), device="cuda")


def test_an_onnx_runtime_without_cuda_is_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", object())
    monkeypatch.setattr(device.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="built without CUDA"):
        open_device("cuda")
