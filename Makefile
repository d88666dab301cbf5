# 'make' lists the targets.
SHELL := bash
PY := .venv/bin/python
DEMO_ARGS ?=
TEST_ARGS ?=

# .venv brings its own Spark: one that the caller's environment points to would be started in its place.
unexport SPARK_HOME SPARK_CONF_DIR PYTHONPATH PYTHONHOME

.PHONY: help setup demo test test-long test-fast check format bench faults figures reference package cluster-test clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv: Python packages, Delta's jars, Java (once; then about a second)
	@bash .ci/setup

demo: setup ## the whole product on a small data set (DEMO_ARGS="…")
	@$(PY) jobs/demo.py $(DEMO_ARGS)

test: setup ## the tests, in two processes (TEST_ARGS="-k name")
	@$(PY) -m pytest tests --ignore=tests/bench --ignore=tests/cluster -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(TEST_ARGS)

test-long: setup ## the tests that make test leaves out: a Kafka broker, notebooks, more deaths
	@$(PY) -m pytest tests --ignore=tests/bench --ignore=tests/cluster -n 2 --dist loadfile --no-loadscope-reorder -m long $(TEST_ARGS)

test-fast: setup ## the pure tests: no Spark, seconds
	@$(PY) -m pytest tests/test_*.py $(TEST_ARGS)

check: setup ## format, lint, types
	@$(PY) -m ruff format --check --quiet . || { echo "run 'make format'" >&2; exit 1; }
	@$(PY) -m ruff check --quiet .
	@$(PY) -m mypy

format: setup ## rewrite the code in the house format
	@$(PY) -m ruff check --quiet --fix --exit-zero .
	@$(PY) -m ruff format .

bench: setup ## how long retraining, ingesting, updating and recommending take
	@$(PY) tests/bench/retrain.py
	@$(PY) tests/bench/ingest.py
	@$(PY) tests/bench/update.py
	@$(PY) tests/bench/recommend.py

faults: setup ## the long campaign: some two hundred kills, torn checkpoints, a full disk (hours)
	@FAULTS=long $(PY) -m pytest tests/faults -n 2 -rP $(TEST_ARGS)

figures: setup ## the paper's figures into figures/ (MTL_DATA names the folder of School and Jester, without which some are left out)
	@$(PY) tests/bench/figure1.py --out figures
ifdef MTL_DATA
	@$(PY) tests/bench/figure2.py --out figures
else
	@echo "2 is not drawn: name the folder of Jester with MTL_DATA (what it holds: $(PY) tests/bench/figure2.py --help)"
endif

reference: setup ## the guides and every public docstring as pages into reference/
	@$(PY) -W ignore -m pdoc --docformat google --output-directory reference mtl.guide mtl.oracle mtl.serving \
		$(patsubst mtl/%.py,mtl.%,$(filter-out mtl/__init__.py,$(wildcard mtl/*.py)))

package: setup ## the wheel and its zip into dist/; with ENV=1 the environment archive too
	@ENV=$(ENV) bash .ci/package

cluster-test: package ## spark-submit on a cluster of three processes, one of them killed; Spark Connect
	@$(PY) -m pytest tests/cluster $(TEST_ARGS)

clean: ## remove what tests and builds left; keeps .venv, data/ and demo/
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis spark-warehouse metastore_db derby.log *.egg-info
	@find mtl jobs tests notebooks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	@rm -rf .venv
