# Everything a newcomer and the CI run.  Each target works alone on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
RUN := FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 MLFLOW_DISABLE_TELEMETRY=true
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench ui clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv and install what is needed

$(STAMP): pyproject.toml
	@test -d .venv || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --no-deps byzfl==0.0.11  # its rules, to compare with; not what its benchmark needs
	@$(BIN)/python -m compileall -q -j 0 $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/mlflow || true
	@touch $(STAMP)

demo: $(STAMP)  ## Train three nodes on real data and record the run (under a minute)
	@$(RUN) $(BIN)/trellis simulate

test: $(STAMP)  ## Run the tests, with coverage
	@$(RUN) $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=90

check: $(STAMP)  ## Formatting, lint, types, import layers
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy trellis strategies conf
	@$(BIN)/lint-imports

bench: $(STAMP)  ## Engines, rules, tracking, masks and private training, against their peers in the same run
	@status=0; for table in engines rules tracking secagg private; do \
	  $(RUN) $(BIN)/python -m experiments.benchmarks.$$table || status=1; done; exit $$status

ui: $(STAMP)  ## The MLflow UI on the recorded runs
	@$(RUN) $(BIN)/trellis ui

clean:  ## Remove .venv and caches (runs/ is kept)
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .coverage*
