# Each target makes an environment and installs what it needs on first use. ARGS are passed on, such
# as make train ARGS="data.path=my.txt run.path=runs/mine".

PYTHON ?= python3
VENV ?= .venv
LOCK ?= constraints.txt
BIN := $(VENV)/bin
ARGS ?=

# The build of a package that comes as source is pinned as well; pip reads the second name from 25.3.
INSTALL = PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) \
	$(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: train test test-all test-newest test-oldest check docs lock bench bench-step bench-distributed

train: $(VENV)/.lab
	$(BIN)/muonscale train $(ARGS)

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/pytest -n 2 $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --summary=none
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/throughput.py $(ARGS)

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
UV := .venv-uv/bin/uv

lock: $(UV)
	$(UV) pip compile pyproject.toml benchmarks/requirements.txt benchmarks/requirements-no-deps.txt \
		--extra dev --group lock --universal --python-version 3.11 --no-annotate --quiet \
		--override benchmarks/overrides.txt --custom-compile-command "make lock" \
		--output-file constraints.txt $(ARGS)

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet --disable-pip-version-check "uv>=0.9"
