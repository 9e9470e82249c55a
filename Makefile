# One word to do anything. `make` alone lists the words.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# The distribution's own, which python3-venv is for: another one on the PATH may be of any age, and slower.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export ANSIBLE_HOME := $(CURDIR)/.ansible
export PYTHONDONTWRITEBYTECODE :=

RUNTIME := $(VENV)/.runtime
DEVELOPMENT := $(VENV)/.development
ASSETS := portal/web/static/vendor/icons.svg
TEXTS := portal/web/translations/zh_Hans_CN/LC_MESSAGES/messages.mo
AGENT := build/remotegpu-agent.pyz
AGENT_SOURCES := $(shell find agent -name '*.py' -o -name '*.toml' -o -name 'build' -type f 2>/dev/null)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: setup ## Set up and start the portal; prints where to sign in (DATABASE_URL, REDIS_URL, PUBLIC_URL are optional)
	@exec $(BIN)/python -m portal serve --first-run

.PHONY: test
test: real-hosts setup $(DEVELOPMENT) ## Set up what the tests need and pass them all (root or Docker for the real hosts)
	@exec $(BIN)/python -m tests.lanes test $(LANES)

.PHONY: test-fast
test-fast: $(DEVELOPMENT) $(ASSETS) $(TEXTS) ## Unit and API tests on SQLite; needs nothing else
	@exec $(BIN)/python -m tests.lanes fast

.PHONY: test-slow
test-slow: real-hosts setup $(DEVELOPMENT) ## What `make test` leaves out: scenarios of roles, gateways, operations, Debian 12 (LANES=… for some)
	@exec $(BIN)/python -m tests.lanes slow $(LANES)

.PHONY: test-all
test-all: real-hosts setup $(DEVELOPMENT) ## Both of them
	@exec $(BIN)/python -m tests.lanes all $(LANES)

.PHONY: check
check: $(DEVELOPMENT) ## Lint, types, import direction, dead links
	@ruff check . && ruff format --check .
	@mypy
	@cd pulumi && mypy --config-file mypy.ini
	@yamllint --strict .
	@ansible-lint --offline -q
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/house

.PHONY: bench
bench: setup $(DEVELOPMENT) ## Measure; prints ratios taken side by side in one run
	@exec $(BIN)/python -m bench

.PHONY: network-plan
network-plan: $(RUNTIME) ## What EXPORT=… would change in the clouds against APPLIED=… (STACK=… for one stack); no engine
	@PYTHONPATH=pulumi $(BIN)/python -m remotegpu_network plan "$(or $(EXPORT),$(error say which: make network-plan EXPORT=export.json))" --applied "$(or $(APPLIED),first)" $(if $(STACK),--stack "$(STACK)")

.PHONY: demo
demo: setup $(DEVELOPMENT) ## Boot two test hosts beside a portal, onboard them, fill a small world (root or Docker)
	@exec $(BIN)/python -m tests.hosts.demo up

.PHONY: demo-down
demo-down: $(DEVELOPMENT) ## Remove the demo
	@exec $(BIN)/python -m tests.hosts.demo down

.PHONY: real-hosts
real-hosts: # Refuse before minutes of setting up, not after
	@$(PYTHON) -m tests.lanes may

.PHONY: setup
setup: $(RUNTIME) $(ASSETS) $(TEXTS) $(AGENT) ## Virtual environment, browser assets, translations, agent

.PHONY: clean
clean: ## Remove what was built; the instance folder with its data stays
	rm -rf $(VENV) node_modules build portal/web/static/vendor .ansible

$(RUNTIME): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@touch $@

$(DEVELOPMENT): $(RUNTIME) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	@touch $@

node_modules/.package-lock.json: package-lock.json .npmrc
	npm ci --silent
	@touch $@

$(ASSETS): node_modules/.package-lock.json portal/web/assets.mjs
	npm run --silent build

$(TEXTS): $(TEXTS:.mo=.po) $(RUNTIME)
	$(BIN)/pybabel --quiet compile --input-file $< --output-file $@ --locale zh_Hans_CN

$(AGENT): $(RUNTIME) $(AGENT_SOURCES)
	agent/build
