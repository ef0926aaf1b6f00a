# make demo      the whole pipeline on the embedded dataset
# make test      the tests that a change wants at once, ten minutes
# make test-all  all tests: kills, servers, installs and benchmarks too
# make check     lint and types
# make up        Prefect, MLflow and a worker in the background; make down stops them
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
LOCKED := $(shell command -v flock >/dev/null && echo flock .venv.lock)
TWO := --numprocesses 2 --dist loadgroup --no-loadscope-reorder
export PATH := $(BIN):$(PATH)

.PHONY: demo test test-all check up down
demo: .venv/installed
	python -m pipelines run

test: .venv/installed
	python -m pytest $(TWO) tests/detr tests/pipelines tests/stages tests/journeys

test-all: .venv/installed
	python -m pytest $(TWO) --durations=30

check: .venv/installed
	ruff check .
	ruff format --check .
	mypy

up: .venv/installed
	python -m pipelines up

down: .venv/installed
	python -m pipelines down

.venv/installed: requirements.lock
	@$(LOCKED) sh -ec '\
		test $@ -nt requirements.lock && exit 0; \
		$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 11) and \"the lock is for Python 3.11, this is \" + sys.version.split()[0] + \"; set PYTHON=python3.11\")"; \
		$(PYTHON) -m venv .venv; \
		.venv/bin/python -m pip install --requirement requirements.lock; \
		.venv/bin/python -m pip check; \
		touch $@'
