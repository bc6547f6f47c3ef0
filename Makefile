# Each target makes an environment and installs what it needs on first use. ARGS are passed on, such
# as make train ARGS="data.path=my.txt run.path=runs/mine".

PYTHON ?= python3
VENV ?= .venv
LOCK ?= constraints.txt
BIN := $(VENV)/bin
UV := .venv-uv/bin/uv
ARGS ?=

# The build of a package that comes as source is pinned as well; pip reads the second name from 25.3.
INSTALL = $(if $(LOCK),PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK)) \
	$(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: train test test-all test-newest test-oldest check docs lock bench bench-step bench-distributed bench-gpu

train: $(VENV)/.lab
	$(BIN)/muonscale train $(ARGS)

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/pytest -n 2 $(ARGS)

# The newest version of everything, in an environment made anew.
test-newest:
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest LOCK= check test

# The lower bounds of pyproject.toml: the optimizer alone with its torch, then all that [lab] installs.
# Left out is what needs newer packages than [lab]: examples, documentation, lm-eval.
OLDEST := .venv-oldest
LOWEST = $(UV) pip compile pyproject.toml --resolution lowest-direct --annotation-style line --no-header --quiet
OF_OPTIM = $(shell grep -L "muonscale.lab\|tests.lab" tests/distributed/test_*.py)
NOT_OF_LAB = $(addprefix --ignore=tests/,examples docs benchmarks lab/evaluation/test_harness.py)

test-oldest: $(UV)
	rm -rf $(OLDEST) $(OLDEST)-optim
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)-optim
	$(LOWEST) --extra lab | grep "muonscale (pyproject.toml)" > $(OLDEST)/lab.txt
	$(UV) pip compile pyproject.toml --extra lab --extra track --extra slurm --extra test \
		--constraint $(OLDEST)/lab.txt --no-annotate --no-header --quiet --output-file $(OLDEST)/lock.txt
	grep --invert-match --extended-regexp "^(torch|triton|cuda-.*|nvidia-.*)==" $(OLDEST)/lock.txt > $(OLDEST)-optim/lock.txt
	$(LOWEST) | grep "^torch==" >> $(OLDEST)-optim/lock.txt
	$(OLDEST)-optim/bin/pip install --quiet --disable-pip-version-check -r $(OLDEST)-optim/lock.txt
	$(OLDEST)-optim/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(OLDEST)-optim/bin/pytest -n 2 -m "not slow" tests/optim tests/transfer $(OF_OPTIM) $(ARGS)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -r $(OLDEST)/lock.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	cat $(OLDEST)/lab.txt
	$(OLDEST)/bin/pytest -n 2 -m "not slow" $(NOT_OF_LAB) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --summary=none --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/check_words.py

docs: $(VENV)/.dev
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/throughput.py $(ARGS)

# On one GPU; ARGS="--device cpu --tiny" shows on a CPU that it works. For the peers install
# benchmarks/requirements.txt into the same environment.
bench-gpu: $(VENV)/.lab
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-step: .venv-bench/.peers
	.venv-bench/bin/python benchmarks/optimizer_step.py $(ARGS)

bench-distributed: $(VENV)/.lab .venv-bench/.peers
	$(BIN)/python benchmarks/distributed.py balance traffic collectives memory plan training
	.venv-bench/bin/python benchmarks/distributed.py time

$(VENV)/.lab: EXTRA = lab
$(VENV)/.dev: EXTRA = dev
$(VENV)/.lab $(VENV)/.dev: pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[$(EXTRA)]"
	touch $@

# The optimizers that others publish live apart, so that none of them meets the project's own venv.
.venv-bench/.peers: VENV = .venv-bench
.venv-bench/.peers: BIN = .venv-bench/bin
.venv-bench/.peers: benchmarks/requirements.txt benchmarks/requirements-no-deps.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e . -r benchmarks/requirements.txt
	$(INSTALL) --no-deps -r benchmarks/requirements-no-deps.txt
	touch $@

# The lock keeps its versions where pyproject.toml allows it; ARGS=--upgrade takes the newest ones.
# torchvision is left out because no package that is installed with its dependencies needs it.
lock: $(UV)
	$(UV) pip compile pyproject.toml benchmarks/requirements.txt benchmarks/requirements-no-deps.txt \
		--extra dev --group lock --universal --python-version 3.11 --no-annotate --quiet \
		--override benchmarks/overrides.txt --custom-compile-command "make lock" \
		--output-file constraints.txt $(ARGS)

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet --disable-pip-version-check "uv>=0.9"
