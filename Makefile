.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
SHELL := /bin/sh
export PATH := $(CURDIR)/.venv/bin:$(CURDIR)/.local/bin:$(PATH)

PYTHON_SOURCES := controller_svc idempotency_svc svckit deploy tests .ci
VENV := .venv/complete

.PHONY: help up token test soak load check fmt gen tools clean reset

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

$(VENV): pyproject.toml uv.lock .ci/uv.txt .ci/venv
	@.ci/venv

up: $(VENV) ## Run the pair with Postgres, Valkey and a token issuer, show a first job, stay up until Ctrl-C
	@python -m deploy.local.up

token: $(VENV) ## Print a token for the pair of `make up`: ROLE=planner,reviewer SUBJECT= TENANT= HOURS=
	@python -m deploy.local.tokens

test: $(VENV) ## Run all tests: TESTS=path or ARGS="-k name" for some of them
	@pytest $(if $(TESTS),,-n 2 --dist loadfile) $(ARGS) $(TESTS)

soak: $(VENV) ## Run the tests that take many minutes
	@pytest -v -s -m soak $(ARGS) $(TESTS)

load: $(VENV) ## Measure the pair, and print one table: ARGS=--help for what to leave out
	@python -m tests.load $(ARGS)

check: $(VENV) ## Check format, lint, types, import rules, protos, generated code and documents
	@.ci/check

fmt: $(VENV) ## Format everything, and repair what can be repaired
	@ruff format --quiet . && ruff check --quiet --fix . && buf format -w

gen: $(VENV) ## Make gen/ and the generated documents anew
	@buf generate && python .ci/docs.py --write

tools: ## Get what only some tests need: grpcurl, ghz, Postgres 15, Redis 7
	@.ci/tools

clean: ## Delete the environment and all caches; data and tools stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.local/*' -prune -exec rm -rf {} +

reset: ## Delete the data and the keys of `make up`
	@python3 -c "import fcntl, os; os.path.exists('.local/up.lock') and fcntl.flock(open('.local/up.lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)" 2>/dev/null \
		|| { echo "make up is running: stop it first"; exit 1; }
	@rm -rf .local/data .local/keys .local/logs
