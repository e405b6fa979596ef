# make test | demo | lint | bench: each makes what it needs first, under .venv and .host, and only once.
#   VENV=...          another virtual environment (missing packages are installed into it)
#   COMFYUI_PATH=...  a ComfyUI source tree to use instead of a downloaded one
#   WORKERS=2         processes that the tests are spread over

VENV ?= .venv
COMFYUI_PATH ?=
WORKERS ?= 2
# versions that were tested together; with an NVIDIA GPU the newest ones, whose build fits its driver
TORCH ?= $(if $(shell command -v nvidia-smi),torch torchvision,torch==2.13.0 torchvision==0.28.0 triton==3.6.0)

PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.svdquant-installed
HOST := $(or $(COMFYUI_PATH),$(CURDIR)/.host/ComfyUI)
WITH_HOST := COMFYUI_PATH="$(HOST)" $(PYTHON)

.PHONY: venv host test lint demo bench clean

venv: $(STAMP)

$(STAMP): requirements.txt tests/requirements.txt tests/host/requirements.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet $(TORCH)
	$(PYTHON) -m pip install --quiet -r tests/host/requirements.txt -r tests/requirements.txt
	touch $@

host: venv
	COMFYUI_PATH="$(COMFYUI_PATH)" $(PYTHON) tests/host/install.py .host

lint: venv
	$(PYTHON) -m ruff check .

# torch's threads are to sleep while they wait: spinning starves them on a machine with few cores
test: export OMP_WAIT_POLICY ?= PASSIVE
test: export OMP_NUM_THREADS ?= 1
# a test that hangs ends the run, and its server with it
test: lint host
	$(WITH_HOST) -m pytest -q -n $(WORKERS) --dist loadfile --timeout 900

demo: host
	$(WITH_HOST) tests/demo.py

bench: venv
	$(PYTHON) tests/bench/bench_linear.py

clean:
	rm -rf .venv .host demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
