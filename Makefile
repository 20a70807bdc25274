# Every target sets itself up in .venv: a machine with Python 3.11 or newer is enough.
.PHONY: demo test check bench clean
.DEFAULT_GOAL := test

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

# A name on the PATH may be a shim that does not run, so each is tried.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

demo: $(VENV)/core.stamp
	@n=1; while [ -e runs/demo-$$n ]; do n=$$((n + 1)); done; \
	$(BIN)/mbrl mpc --env pup-walk --steps 200 --horizon 20 --planner mppi --planner.population 40 \
		--planner.knot-spacing 5 --planner.spline linear --planner.beta 0 --planner.std 0.3 \
		--out runs/demo-$$n && \
	echo "Report: $(CURDIR)/runs/demo-$$n/report.html"

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --dist loadfile

# mypy without file names: a file given by its root path would be another module.
check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/core.stamp
	$(BIN)/python -m mbrl.experiments.benchmarks.throughput

# torch comes first and by version, so that an index with CPU builds can supply a small one.
# Where that version is not to be had, its pin must not stand in the way of another.
$(VENV)/core.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mbrl-kit needs Python 3.11 or newer on the PATH, but none was found. Install it, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" || $(PIP) install torch
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt -e ".[video]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	$(PIP) install -c $(VENV)/constraints.txt -e ".[dev,robots]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
