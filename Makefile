# Everything runs from one environment, .venv, that uv makes from uv.lock. `make` alone says what there is.
.DEFAULT_GOAL := help
.SUFFIXES:

PYTHON := .venv/bin/python
VENV := .venv/.made
PYTEST := $(PYTHON) -m pytest
# Three for two cores: half of a test's time is a wait for another process.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) \* 3 / 2)
# On CI a skipped test is a failed one: there, nothing may be missing.
PARALLEL := -n $(WORKERS) --dist worksteal $(if $(CI),-p tools.fail_on_skip)

export UV_PYTHON_DOWNLOADS := never
# The machine's own certificates, so that what curl and git trust, uv trusts; SSL_CERT_FILE still comes first.
export UV_SYSTEM_CERTS ?= true
# No home directory that can be written to (containers, CI): the downloads are kept beside the tree's other leftovers.
ifneq ($(shell test -n "$$HOME" && test -w "$$HOME" && echo yes),yes)
export UV_CACHE_DIR ?= $(CURDIR)/.tools/uv-cache
endif

.PHONY: help demo test test-emulator test-shared test-providers faults fuzz bench check sync clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV) ## One session, end to end on this machine, no account (ARGS="--help" lists the options)
	@$(PYTHON) -m tools.demo $(ARGS)

test: $(VENV) ## Every test (WORKERS=1 ARGS="-x": one at a time, to the first that fails)
	@$(PYTEST) $(PARALLEL) $(ARGS)

test-emulator: $(VENV) ## The emulator's tests only
	@$(PYTEST) $(PARALLEL) tests/emulator $(ARGS)

test-shared: $(VENV) ## The shared core's tests only
	@$(PYTEST) $(PARALLEL) tests/shared $(ARGS)

test-providers: $(VENV) ## The providers' tests only
	@$(PYTEST) $(PARALLEL) tests/providers $(ARGS)

faults: $(VENV) ## Random fault schedules against the core (N=1000 SEED=0); the first that fails is shrunk
	@$(PYTHON) -m tests.faults --n $(or $(N),1000) --seed $(or $(SEED),0) $(ARGS)

fuzz: $(VENV) ## 100,000 hostile requests against the webhook handler
	@FUZZ_REQUESTS=100000 $(PYTEST) tests/shared/test_handler_hostile.py $(ARGS)

bench: $(VENV) ## 2,000 sessions on the emulator (N=2000), with ratios that say what a session costs
	@$(PYTHON) -m tools.bench --sessions $(or $(N),2000) $(ARGS)

check: $(VENV) ## Lint, format, types (strict) and the vendored copies
	@$(PYTHON) -m tools.check

sync: $(VENV) ## Copy shared/ into the provider folders; fill their settings tables and SECURITY.md's
	@$(PYTHON) -m tools.sync_shared
	@$(PYTHON) -m tests.redteam

clean: ## Remove everything that make made
	rm -rf .venv .tools .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): uv.lock pyproject.toml tools/venv.sh tools/bootstrap_uv.py
	@sh tools/venv.sh
	@touch $@
