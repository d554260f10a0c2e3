# The course's commands. Everything is installed into .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
ONLY ?=
QUICK ?=

# What make starts shares its cores. Two OpenMP threads wait for each other after every operator, in a spin of milliseconds
# by default; beside other work that spin takes the core from the thread that is waited for. So: a short spin, then sleep.
# Freed memory is kept instead of given back after every step, which pays for the sleep. bench/quiet.py measures both;
# a value that you export yourself stays.
export GOMP_SPINCOUNT ?= 1000
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 268435456

.DEFAULT_GOAL := help
.PHONY: help course lab test bench export outputs study clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 16

# made once, and again when the dependencies or JupyterLab's settings change
.venv/ready: settings.ini setup.py pyproject.toml constraints.txt $(wildcard tools/jupyter/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	mkdir -p .venv/etc/jupyter .venv/share/jupyter/lab/settings
	cp tools/jupyter/jupyter_server_config.py .venv/etc/jupyter/
	cp tools/jupyter/overrides.json .venv/share/jupyter/lab/settings/
	touch $@

course: .venv/ready ## run lessons and appendix on a Jupyter kernel into _course/ (ONLY=03, ONLY=tracer: one)
	@$(BIN)/python tools/course.py course $(ONLY)

lab: .venv/ready ## open JupyterLab on the first lesson (QUICK=1: everything in its smallest size)
	$(if $(QUICK),RESTORE_BUDGET=test )$(BIN)/jupyter lab --ServerApp.root_dir=. \
		--LabApp.default_url=/lab/tree/nbs/00_data.ipynb

test: .venv/ready ## the whole gate: export in sync, notebooks clean, style, notebooks under IN_TEST, pytest
	@$(BIN)/python tools/gate.py

bench: .venv/ready ## one table of ratios against peers
	@$(BIN)/python bench/run.py

export: .venv/ready ## write restore_lib/ from nbs/
	$(BIN)/nbdev-export

outputs: .venv/ready ## run notebooks for real and keep their outputs in place (ONLY=03, ONLY=tracer: one)
	@$(BIN)/python tools/course.py outputs $(ONLY)

study: .venv/ready ## run a lesson with the study budget in the background, resumable (ONLY=03)
	@$(BIN)/python tools/course.py study $(ONLY)

clean: ## remove what the commands above made (not .venv)
	rm -rf _course build *.egg-info .pytest_cache
