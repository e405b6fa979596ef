# Each target makes what it needs first, under .venv, .venv-oldest and .host, and only once. tests/README.md says what
# each lane runs and how long it may take.
#   make check        lint, types and the fast half of the tests: under two minutes once everything is installed
#   make test         lint and all tests, against ComfyUI 0.3.75
#   make test-oldest  the tests that need no ComfyUI, on the lowest versions the pack states
#   make test-all     both of these and the demo
#   make demo         quantize and sample a small model in a real ComfyUI, and draw the comparison
#   make bench        measure the layers
#   make bench-check  every bench of speed and its bounds, on this machine; what they print goes to tests/bench/checks.txt
#   make fuzz         50,000 damaged inputs; prints their seed, kinds and what came of them
#   make kills        50 kills at random instants, of commands and of ComfyUI's server
#   make soak         300 prompts from several clients to a real ComfyUI, with faults; SVDQUANT_SOAK=1000 for more
#   make audit        licences and known vulnerabilities of what users are asked to install
#   make mutants      change the code in 300 places, one at a time, and see whether the tests notice
#
#   VENV=...          another virtual environment (missing packages are installed into it)
#   COMFYUI_PATH=...  a ComfyUI source tree to use instead of a downloaded one
#   WORKERS=2         processes that the tests are spread over
#   MUTANTS=...       options of tests/mutants.py, such as --seed 2 or --again

VENV ?= .venv
COMFYUI_PATH ?=
WORKERS ?= 2
# versions that were tested together; with an NVIDIA GPU the newest ones, whose build fits its driver
TORCH ?= $(if $(shell command -v nvidia-smi),torch torchvision,torch==2.13.0 torchvision==0.28.0 triton==3.6.0)

PYTHON := "$(VENV)/bin/python"
OLDEST := .venv-oldest
AUDIT := .venv-audit
MUTATOR := .venv-mutants
HOST_PATH := COMFYUI_PATH="$(or $(COMFYUI_PATH),$(CURDIR)/.host/ComfyUI)"
WITH_HOST := $(HOST_PATH) $(PYTHON)
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile --timeout 900 # a test that hangs ends the run, and its server
FAST := not slow and not network

.PHONY: venv install install-oldest host lint types check test test-oldest test-all demo bench bench-check fuzz kills soak audit \
mutants clean

# What was installed is compared by a recipe, because make cannot name a file whose path has a space.
LISTS := { cat requirements.txt tests/requirements.txt tests/tools.txt tests/host/requirements.txt; echo "$(TORCH)"; }

venv:
	@$(LISTS) | cmp -s - "$(VENV)/.svdquant-installed" || $(MAKE) --no-print-directory install

install:
	test -x $(PYTHON) || python3 -m venv "$(VENV)"
	$(PYTHON) -m pip install --quiet $(TORCH)
	$(PYTHON) -m pip install --quiet -r tests/host/requirements.txt -r tests/requirements.txt
	@$(LISTS) > "$(VENV)/.svdquant-installed"

# torch's own dependencies are installed with it, CUDA and all: it does not load without them
install-oldest:
	test -x $(OLDEST)/bin/python || python3 -m venv $(OLDEST)
	cat tests/oldest.txt tests/tools.txt | cmp -s - $(OLDEST)/.svdquant-installed || \
	$(OLDEST)/bin/python -m pip install --quiet -r tests/oldest.txt -r tests/tools.txt
	cat tests/oldest.txt tests/tools.txt > $(OLDEST)/.svdquant-installed

host: venv
	COMFYUI_PATH="$(COMFYUI_PATH)" $(PYTHON) tests/host/install.py .host

lint: venv types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: venv
	$(PYTHON) tests/typecheck.py

# torch's threads are to sleep while they wait: spinning starves them on a machine with few cores
check test test-oldest soak mutants: export OMP_WAIT_POLICY ?= PASSIVE
check test test-oldest soak mutants: export OMP_NUM_THREADS ?= 1

check: lint
	$(PYTHON) $(PYTEST) -m "$(FAST)"

test: lint host
	$(WITH_HOST) $(PYTEST)

test-oldest: install-oldest
	$(OLDEST)/bin/python $(PYTEST) tests/quantize tests/kernels tests/test_layers.py \
	--ignore tests/kernels/test_newest_triton.py

test-all: test demo test-oldest

demo: host
	$(WITH_HOST) tests/demo.py

bench: venv
	$(PYTHON) tests/bench/bench_linear.py

# a bound that is missed is in the output and in the exit code, and ends nothing
CHECKS := linear model whole host compile load lora
bench-check: host
	{ git log -1 --format='commit %h, %cs'; sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1; } > tests/bench/checks.txt
	failed=; for name in $(CHECKS); do echo "\n$$ tests/bench/bench_$$name.py --check"; \
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(WITH_HOST) tests/bench/bench_$$name.py --check || \
	{ echo "exit $$?"; failed="$$failed $$name"; }; done >> tests/bench/checks.txt; \
	cat tests/bench/checks.txt; test -z "$$failed" || { echo "missed:$$failed"; exit 1; }

# another seed each time, unless SVDQUANT_FUZZ_SEED names one; the figures say which it was
fuzz: host
	SVDQUANT_FUZZ=50000 SVDQUANT_FUZZ_SEED=$${SVDQUANT_FUZZ_SEED:-$$(date +%s)} OMP_NUM_THREADS=1 \
	$(WITH_HOST) -m pytest -q -n $(WORKERS) tests/quantize/test_fuzz.py tests/nodes/test_fuzz_loras.py

kills: host
	SVDQUANT_KILLS=50 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	$(WITH_HOST) -m pytest -q tests/quantize/test_kills.py tests/nodes/test_server_kills.py

soak: host
	$(WITH_HOST) tests/soak.py

# the packages lie in a folder of their own, so that what is looked at is what users get and nothing else
audit:
	test -x $(AUDIT)/bin/python || python3 -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1
	$(AUDIT)/bin/python -m pip install --quiet --upgrade --target $(AUDIT)/users -r requirements.txt
	$(AUDIT)/bin/python tests/audit.py $(AUDIT)/users

mutants: host
	test -x $(MUTATOR)/bin/python || python3 -m venv $(MUTATOR)
	cmp -s tests/mutants.txt $(MUTATOR)/.svdquant-installed || \
	$(MUTATOR)/bin/python -m pip install --quiet -r tests/mutants.txt
	cp tests/mutants.txt $(MUTATOR)/.svdquant-installed
	$(HOST_PATH) $(MUTATOR)/bin/python tests/mutants.py --python $(PYTHON) $(MUTANTS)

clean:
	rm -rf .venv $(OLDEST) $(AUDIT) $(MUTATOR) .mutants .host demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
