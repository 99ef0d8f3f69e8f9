"""Every way in which a GPU cannot be used, or is lost, is one sentence; with `auto` the CPU takes over."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from fake_cupy import CUDARuntimeError, install

from lsp_agent.cli import app
from lsp_agent.engine import device, engine
from lsp_agent.engine.device import CpuDevice, CudaDevice, open_device
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.gpu import errors
from lsp_agent.engine.gpu.errors import GpuLost, NoGpu, explain, explained, in_use_by
from lsp_agent.engine.gpu.host_call import HostCall
from lsp_agent.errors import UserError

INSUFFICIENT = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch):
    monkeypatch.delenv("LSP_AGENT_DEVICE", raising=False)
    monkeypatch.setattr(errors, "in_use_by", lambda: "")


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"driver": 0}, "No NVIDIA driver is installed; install one, or use the CPU."),
        ({"driver": 12040}, "too old: it knows CUDA 12.4 and CUDA 13 is needed; install driver 580 or later"),
        ({"fails": {"getDeviceCount": INSUFFICIENT}}, "too old for CUDA 13; install driver 580 or later."),
        ({"count": 0}, "This machine has no NVIDIA GPU; use the CPU."),
        (
            {"fails": {"getDeviceCount": "cudaErrorNoDevice: no CUDA-capable device is detected"}},
            "CUDA_VISIBLE_DEVICES",
        ),
        ({"fails": {"getDeviceCount": "cudaErrorSystemNotReady: x"}}, "No NVIDIA GPU can be used (cudaErrorSystemNotR"),
        ({"capability": (7, 5)}, "compute capability 7.5 and 8.0 is the least"),
        (
            {"fails": {"Stream": "cudaErrorMemoryAllocation: out of memory"}},
            "no memory left, not even to start. End what",
        ),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_sentence_and_auto_takes_the_cpu(monkeypatch, caplog, broken, sentence):
    install(monkeypatch, **broken)
    with pytest.raises(NoGpu) as raised:
        open_device("cuda")
    assert sentence in str(raised.value) and str(raised.value).endswith(".")
    with caplog.at_level(logging.INFO):
        assert isinstance(open_device(), CpuDevice)
    assert sentence in caplog.text
    assert isinstance(open_device("cpu"), CpuDevice)


def test_auto_takes_a_gpu_that_works(monkeypatch):
    install(monkeypatch)
    assert isinstance(open_device(), CudaDevice)
    monkeypatch.setenv("LSP_AGENT_DEVICE", "cpu")
    assert isinstance(open_device(), CpuDevice)


@pytest.fixture
def loaded(monkeypatch, tiny_package):
    """`loaded(device)`: the devices that were tried, and with what placement, when the tiny model was loaded."""
    tried = []

    def fake(self, package, threads, context, accuracy, device, on_progress=None, placement=None):
        tried.append((device.name, placement and placement.kind))
        if device.name == "cuda" and fails:
            raise UserError(fails[0])

    fails: list[str] = []
    monkeypatch.setattr(Engine, "__init__", fake)
    monkeypatch.setattr(Engine, "prepare", lambda _: tried.append("prepared"))

    def load(name=None, fail="", **options):
        tried.clear()
        fails[:] = [fail] if fail else []
        Engine.load(tiny_package(), threads=1, device=name, **options)
        return tried

    return load


def test_the_engine_takes_the_gpu_only_if_the_plan_fits(monkeypatch, caplog, loaded):
    install(monkeypatch)
    assert loaded() == [("cuda", "resident"), "prepared"]
    assert loaded(accuracy="exact") == [("cpu", None)]
    install(monkeypatch, free=10**9)
    monkeypatch.setattr(engine, "in_use_by", lambda: "Of the GPU's memory, python (process 7) holds 79.0 GB.")
    assert loaded() == [("cpu", None)]
    assert "Running on the CPU: package needs" in caplog.text and "python (process 7) holds 79.0 GB." in caplog.text
    with pytest.raises(
        UserError, match=r"1\.0 GB are free; use the CPU or a smaller model\. Of the GPU's memory, pyth"
    ):
        loaded("cuda")


def test_a_load_that_fails_on_the_gpu_goes_on_on_the_cpu_unless_the_gpu_was_asked_for(monkeypatch, caplog, loaded):
    install(monkeypatch)
    assert loaded(fail="The GPU is full.") == [("cuda", "resident"), ("cpu", None)]
    assert "Running on the CPU: The GPU is full." in caplog.text
    with pytest.raises(UserError, match=r"^The GPU is full\.$"):
        loaded("cuda", fail="The GPU is full.")


ORT_LOST = (
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; "
    "hostname=h ; file=/onnxruntime/core/providers/cuda/cuda_execution_provider.cc ; line=455 ; expr=cudaStreamSync"
)


@pytest.mark.parametrize(
    ("error", "quoted"),
    [
        (RuntimeError(ORT_LOST), "(CUDA failure 700: an illegal memory access was encountered)"),
        (RuntimeError("Non-zero status code: CUDA failure 719: unspecified launch failure ; GPU=0"), "failure 719"),
        (RuntimeError("CUDA failure 46: all CUDA-capable devices are busy or unavailable ; GPU=-1"), "failure 46"),
        (RuntimeError("CUDA failure 4: driver shutting down ; GPU=0"), "failure 4"),
        (CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered"), "cudaErrorIllegalAddr"),
        (CUDARuntimeError("cudaErrorLaunchFailure: unspecified launch failure"), "cudaErrorLaunchFailure"),
        (type("CUDADriverError", (Exception,), {})("CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error"), "ECC"),
        (RuntimeError("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0"), "CUBLAS"),
    ],
)
def test_a_lost_gpu_is_told(error, quoted):
    sentence = explain(error)
    assert isinstance(sentence, GpuLost) and quoted in str(sentence)
    assert str(sentence).endswith("set LSP_AGENT_DEVICE=cpu.") and "hostname" not in str(sentence)
    with pytest.raises(GpuLost), explained():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        type("OutOfMemoryError", (MemoryError,), {})(
            "Out of memory allocating 9 bytes (allocated so far: 1 bytes). cupy"
        ),
        RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 99"),
        RuntimeError("CUDA failure 2: out of memory ; GPU=0"),
        CUDARuntimeError("cudaErrorMemoryAllocation: out of memory"),
    ],
)
def test_too_little_memory_names_who_holds_it(monkeypatch, error):
    monkeypatch.setattr(errors, "in_use_by", lambda: "Of the GPU's memory, ollama (process 9) holds 60.1 GB.")
    sentence = explain(error)
    assert type(sentence) is UserError
    assert str(sentence).startswith("The GPU has too little memory left for this request. Of the GPU's memory, ollama")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Input shape mismatch"),
        ValueError("700"),
        RuntimeError("CUDA failure 1: invalid argument"),
        OSError(),
    ],
)
def test_other_errors_are_left_alone(error):
    assert explain(error) is None
    with pytest.raises(type(error)), explained():
        raise error


def test_who_holds_the_gpus_memory_is_read_from_nvidia_smi(monkeypatch):
    monkeypatch.undo()
    output = f"4321, /usr/bin/python3, 40000\n{os.getpid()}, /usr/bin/me, 100\n77, C:\\a, b.exe, [N/A]\nnonsense\n"
    seen = []

    def run(command, **_):
        seen.append(command)
        return SimpleNamespace(stdout=output, returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert in_use_by() == (
        "Of the GPU's memory, python3 (process 4321) holds 41.9 GB, C:\\a,b.exe (process 77) holds some memory."
    )
    assert seen[0][0] == "nvidia-smi"
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="No devices were found", returncode=6)
    )
    assert in_use_by() == ""

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert in_use_by() == ""


def test_without_the_gpus_packages_auto_is_the_cpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert isinstance(open_device(), CpuDevice)
    monkeypatch.setitem(sys.modules, "cupy", object())
    monkeypatch.setattr(device.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert isinstance(open_device("auto"), CpuDevice)


def test_generate_ends_with_the_sentence_when_the_gpu_is_lost(monkeypatch, tiny_package, tmp_path):
    class Lost:
        tokenizer = SimpleNamespace(encode=lambda text: [1, 2])

        def generate(self, *_, **__):
            raise RuntimeError(ORT_LOST)
            yield

    monkeypatch.setattr(Engine, "load", lambda *_, **__: Lost())
    (tmp_path / "prompt").write_text("x")
    arguments = ["generate", "--model", str(tiny_package()), "--prompt-file", str(tmp_path / "prompt")]
    result = CliRunner().invoke(app, [*arguments, "--device", "auto"])
    assert isinstance(result.exception, GpuLost) and "CUDA failure 700" in str(result.exception)


def test_what_cuda_says_in_a_call_of_the_host_is_not_cut_off():
    signature = "onnxruntime::CudaCall(ERRTYPE, const char*, SUCCTYPE) [with " + "ERRTYPE = cudaError; " * 20 + "] "

    def run(*_):
        raise RuntimeError(f"[ONNXRuntimeError] : {signature}CUDA failure 700: an illegal memory access ; GPU=0")

    call = HostCall(run, 0)
    said = ctypes.string_at(call._call(1, 1, [])).decode()
    assert len(said) <= 400 and said.startswith("[ONNXRuntimeError]")
    assert isinstance(explain(RuntimeError(said)), GpuLost)


def test_a_kernel_of_ours_says_that_the_gpu_is_lost():
    said = "Status Message: gate_prompt: the launch failed with 700 (an illegal memory access was encountered)"
    lost = explain(RuntimeError(said))
    assert isinstance(lost, GpuLost)
    assert "in mid-run (gate_prompt: the launch failed with 700 (an illegal memory access was encountered))" in str(
        lost
    )
