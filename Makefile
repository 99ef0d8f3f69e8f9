# Everything runs in .venv, which every target makes by itself. PYTHON chooses the interpreter (3.11 to 3.14).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL ?= qwen2.5-coder-1.5b
TEST_MODEL ?= qwen2.5-coder-0.5b
DEMO_BUG ?= page-off-by-one
DEMO_DIR := build/demo

.PHONY: setup demo test test-gpu test-parity test-llama lint format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,test,lint]'
	@touch $@

# The main job on the embedded model: break an example, watch it being repaired, with proof.
demo: setup
	@$(BIN)/lsp-agent model pull $(DEMO_MODEL)
	@rm -rf $(DEMO_DIR)
	@$(BIN)/python examples/make_buggy.py $(DEMO_BUG) $(DEMO_DIR)
	@$(BIN)/lsp-agent fix $(DEMO_DIR) --model $(DEMO_MODEL)

test: setup lint
	@$(BIN)/lsp-agent model pull $(TEST_MODEL)
	@$(BIN)/python -m pytest -m "not parity and not gpu and not llama and not editor" $(PYTEST_ARGS)

# On a machine with an NVIDIA GPU: onnxruntime-gpu replaces onnxruntime, in an environment of its own.
test-gpu:
	@test -x $(VENV)-gpu/bin/python || $(PYTHON) -m venv $(VENV)-gpu
	@$(VENV)-gpu/bin/python -m pip install --quiet --disable-pip-version-check -e '.[gpu,test]'
	@$(VENV)-gpu/bin/python -m pytest -m gpu $(PYTEST_ARGS)

# Exactness against transformers, in an environment of its own (torch is large and never needed to run), and, where npm
# is installed, against llama.cpp. LSP_AGENT_PARITY_EXAMPLES sets how many random configurations are tried. Takes 8 GB.
PARITY_CACHE := $(CURDIR)/build/parity
test-parity: export LSP_AGENT_PARITY_GGUF = $(PARITY_CACHE)/models/$(TEST_MODEL)/source.gguf
test-parity:
	@test -x $(VENV)-parity/bin/python || $(PYTHON) -m venv $(VENV)-parity
	@$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,test,parity]'
	@test -f $$LSP_AGENT_PARITY_GGUF || \
		LSP_AGENT_CACHE_DIR=$(PARITY_CACHE) $(VENV)-parity/bin/lsp-agent model pull --keep-source $(TEST_MODEL)
	@$(VENV)-parity/bin/python -m pytest -m parity tests/parity $(PYTEST_ARGS)

# Against a real llama.cpp server. LSP_AGENT_LLAMA_SERVER is its binary: from llama.cpp's releases or a package manager
# (`brew install llama.cpp`), or built: `cmake -B build -DLLAMA_CURL=OFF && cmake --build build --target llama-server`.
test-llama: export LSP_AGENT_LLAMA_GGUF ?= $(CURDIR)/build/llama/models/$(TEST_MODEL)/source.gguf
test-llama: export LSP_AGENT_LLAMA_SERVER ?= $(shell command -v llama-server)
test-llama: setup
	@test -x "$$LSP_AGENT_LLAMA_SERVER" || \
		{ echo "Set LSP_AGENT_LLAMA_SERVER to llama.cpp's llama-server: see the comment in the Makefile." >&2; exit 2; }
	@test -f "$$LSP_AGENT_LLAMA_GGUF" || \
		LSP_AGENT_CACHE_DIR=$(CURDIR)/build/llama $(BIN)/lsp-agent model pull --keep-source $(TEST_MODEL)
	@$(BIN)/python -m pytest -m llama $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-gpu $(VENV)-parity build
