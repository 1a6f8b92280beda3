# `make demo` and `make test` each set up .venv by themselves, once; see README.md.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check
PINNED := pyproject.toml constraints.txt
CHECK_PYTHON := import sys; sys.version_info >= (3, 12) or sys.exit("polarjax: .venv holds Python " \
	+ sys.version.split()[0] + ", but 3.12 or newer is needed. Hint: remove .venv and run make again.")
# A GPU is used if you ask for it (JAX_PLATFORMS=cuda) and have installed polarjax[cuda13] into .venv.
export JAX_PLATFORMS ?= cpu

.PHONY: help demo test lint venv clean

help:
	@echo "make demo    convert, sparsify and decode the bundled model, with tables and pictures"
	@echo "make test    run all tests, the linter and the type checker among them (ARGS=... goes to pytest)"
	@echo "make lint    the linter, the formatter's check and the type checker alone"
	@echo "make venv    only set up .venv with everything that development needs"
	@echo "make clean   remove caches and build output; .venv stays"

demo: $(VENV)/.ready-to-run
	@echo "polarjax: running the demo"
	@$(PYTHON) -m polarjax.cli.main demo $(ARGS)

test: $(VENV)/.ready-to-test
	@echo "polarjax: running the tests"
	@$(PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)
	@echo "polarjax: all tests passed"

lint: $(VENV)/.ready-to-test
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m pyrefly check --python-interpreter-path $(PYTHON) --min-severity error
	@echo "polarjax: nothing to complain about"

venv: $(VENV)/.ready-to-test
	@echo "polarjax: .venv is ready"

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis polarjax-demo
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	@echo "polarjax: clean; remove .venv too for a fresh start"

$(PYTHON):
	@.ci/make-venv

$(VENV)/.pip: | $(PYTHON)
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m ensurepip
	@$(PIP) "pip>=25.1"
	@touch $@

$(VENV)/.ready-to-run: $(PINNED) | $(VENV)/.pip
	@echo "polarjax: installing what the demo needs into .venv (about a minute)"
	@$(PIP) --constraint constraints.txt --editable ".[plot]"
	@touch $@

$(VENV)/.ready-to-test: $(PINNED) | $(VENV)/.pip
	@echo "polarjax: installing what the tests need into .venv (about 6 GB with torch; one to several minutes)"
	@$(PIP) --constraint constraints.txt --editable ".[plot]" --group dev
	@echo "polarjax: installing the compiler for GPU kernels into .venv/aot (no GPU needed)"
	@$(PIP) --constraint constraints.txt --group aot --no-deps --upgrade --target $(VENV)/aot
	@touch $(VENV)/.ready-to-run $@
