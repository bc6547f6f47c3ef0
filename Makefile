# Each target makes .venv and installs what it needs on first use. ARGS are passed on, such as
# make train ARGS="data.path=my.txt run.path=runs/mine".

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: train test test-all check docs bench bench-step bench-distributed

train: .venv/.lab
	$(BIN)/muonscale train $(ARGS)

test: .venv/.dev
	$(BIN)/pytest -n 2 -m "not slow" $(ARGS)

test-all: .venv/.dev
	$(BIN)/pytest -n 2 $(ARGS)

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --summary=none
	$(BIN)/lint-imports

docs: .venv/.dev
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict

bench: .venv/.dev
	$(BIN)/python benchmarks/throughput.py $(ARGS)

bench-step: .venv-bench/.peers
	.venv-bench/bin/python benchmarks/optimizer_step.py $(ARGS)

bench-distributed: .venv/.lab .venv-bench/.peers
	$(BIN)/python benchmarks/distributed.py balance traffic collectives memory plan training
	.venv-bench/bin/python benchmarks/distributed.py time

# The optimizers that others publish live apart, so that none of them meets the project's own venv.
.venv-bench/.peers: benchmarks/requirements.txt constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r $< -c constraints.txt
	.venv-bench/bin/pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31 muon-fsdp2==0.3.0
	touch $@

.venv/.lab: EXTRA = lab
.venv/.dev: EXTRA = dev
.venv/.lab .venv/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRA)]"
	touch $@
