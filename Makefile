# The front door. Everything it makes lies under .lowmem/; `make clean` removes that folder.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Targets are paths, and make splits them at spaces; the shell and the tools split at more.
ifneq ($(shell [[ $$PWD =~ [^[:alnum:]/._+@,-] ]] && echo odd),)
$(error the path of this checkout holds a space or another character that make cannot bear; move it to a path of letters, digits and /._+@,-)
endif

# A Python that any user can run: the on-host environments are built from it. `make demo PYTHON=python3.12` takes another.
PYTHON ?= $(shell scripts/find-python)
# Passed on to ansible-playbook, e.g. `make demo ARGS='-e lowmem_port=8010'`.
ARGS ?=

# not to be named from outside: `make clean` removes it
override STATE := $(CURDIR)/.lowmem
VENV := $(STATE)/venv
BIN := $(VENV)/bin

export PIP_CACHE_DIR := $(STATE)/cache/pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export XDG_CACHE_HOME := $(STATE)/cache/xdg
export HF_HOME := $(STATE)/cache/huggingface
export ANSIBLE_HOME := $(STATE)/cache/ansible
export PYTHONPYCACHEPREFIX := $(STATE)/cache/pycache
export VIRTUAL_ENV := $(VENV)
export PATH := $(BIN):$(PATH)

RUNTIME := $(STATE)/requirements.$(shell sha256sum requirements.txt pyproject.toml | sha256sum | cut -c1-12).stamp
DEVTOOLS := $(STATE)/requirements-dev.$(shell sha256sum requirements-dev.txt | cut -c1-12).stamp

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: setup ## from nothing to a verified vLLM service on this machine, without a GPU
	@scripts/preconditions engine
	@"$(BIN)/ansible-playbook" site.yml $(ARGS)

.PHONY: setup
setup: $(RUNTIME) ## the controller's environment, .lowmem/venv

$(RUNTIME): requirements.txt pyproject.toml
	@scripts/preconditions controller "$(PYTHON)"
	@scripts/mark-state
	@test -x "$(BIN)/pip" || { echo "creating $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv "$(VENV)"; }
	@echo "installing the locked controller packages (requirements.txt)"
	@"$(BIN)/pip" install -qq --no-compile --require-hashes -r requirements.txt
	@"$(BIN)/pip" install -qq --no-deps --no-build-isolation --editable .
	@rm -f -- "$(STATE)"/requirements.*.stamp && touch "$@"

$(DEVTOOLS): requirements-dev.txt | setup
	@echo "installing the locked development tools (requirements-dev.txt)"
	@"$(BIN)/pip" install -qq --no-compile --require-hashes -r requirements-dev.txt
	@rm -f -- "$(STATE)"/requirements-dev.*.stamp && touch "$@"

.PHONY: lint
lint: setup $(DEVTOOLS) ## ruff, mypy, import-linter, shellcheck, yamllint, ansible-lint
	@scripts/lint

.PHONY: test
test: lint ## lint, then every test; builds the demo's environments where they are missing
	@scripts/test $(ARGS)

.PHONY: test-quick
test-quick: lint ## lint, then the tests that need no engine
	@"$(BIN)/pytest" -m "not engine" $(ARGS)

.PHONY: molecule
molecule: setup $(DEVTOOLS) ## the roles on real systemd hosts (root); one scenario with SCENARIO=name
	@"$(BIN)/python" molecule/run $(SCENARIO)

.PHONY: docs
docs: setup ## write docs/variables.md again from the argument specs and the variables of the playbooks
	@"$(BIN)/python" scripts/variables_doc.py

.PHONY: dashboards
dashboards: setup $(DEVTOOLS) ## write the Grafana dashboards again from scripts/dashboards.py
	@"$(BIN)/python" scripts/dashboards.py

.PHONY: lock
lock: ## lock requirements*.txt again from pyproject.toml (needs uv)
	@scripts/lock

.PHONY: stop
stop: ## stop the demo's service
	@scripts/stop-demo

.PHONY: clean
clean: ## stop the demo's service and remove everything that make made
	@scripts/clean
