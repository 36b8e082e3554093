# Every target sets up what it needs in .venv by itself and is quick the second time.
.DEFAULT_GOAL := help
PYTHON_BIN := .venv/bin/python

.PHONY: help setup demo demo-mooncake test test-fast test-etcd check bench-smoke clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: ## install everything into .venv
	@scripts/setup.sh

demo: setup ## two sites, real SGLang on CPU, one hybrid model: watch a prompt cross the link
	@.venv/bin/prfaas demo

demo-mooncake: setup ## the same demo over SGLang's stock mooncake_tcp backend
	@.venv/bin/prfaas demo --backend mooncake_tcp

test: setup check ## every check and every test, real engine included
	@scripts/test.sh

test-fast: setup ## tests without the real engine and without the slow ones of etcd (under 3 minutes)
	$(PYTHON_BIN) -m pytest -m "not engine and not gpu and not slow"

test-etcd: setup ## tests of the etcd client and of replication alone (under 3 minutes)
	$(PYTHON_BIN) -m pytest tests/integration/etcd tests/integration/replication

check: setup ## ruff, mypy --strict on the cores, import layers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PYTHON_BIN) -m pytest -q tests/layering

bench-smoke: setup ## every benchmark for a few seconds, so that none rots
	$(PYTHON_BIN) -m benchmarks.smoke

clean: ## remove .venv and everything generated
	rm -rf .venv build runs *.egg-info cache_service/native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
