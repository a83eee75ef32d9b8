# make demo   see FlashAttention verified and measured against normal attention (about a minute)
# make test   every check, three at a time
# make bench  the CPU figures of docs/benchmarks.md
# make notebooks   execute the lessons; write them as HTML to build/notebooks/, and the README's animation
# make docs   the API pages, from docstrings, in build/api/
# make release     build sdist and wheel into dist/, install them in an empty environment, say what is left to do

PYTHON ?= python3
# Through the interpreter, never through the scripts in .venv/bin: their first line breaks where the path has a space in it.
VENV_PYTHON := .venv/bin/python
PIP_FLAGS ?=
DEMO_SIZE := --q_len 1024 --kv_len 1024

.PHONY: demo test bench notebooks docs release clean

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --quiet --upgrade pip
	$(VENV_PYTHON) -m pip install --quiet $(PIP_FLAGS) -r requirements.txt
	touch $@

demo: .venv/installed
	$(VENV_PYTHON) checks/check_forward.py $(DEMO_SIZE)
	$(VENV_PYTHON) checks/check_forward_causal.py $(DEMO_SIZE)
	$(VENV_PYTHON) checks/check_backward.py $(DEMO_SIZE)
	$(VENV_PYTHON) checks/check_backward_causal.py $(DEMO_SIZE)
	$(VENV_PYTHON) bench.py --type all --h 8 --q_len 2048 --kv_len 2048 --d 64
	$(VENV_PYTHON) bench_causal.py --type all --h 8 --q_len 2048 --kv_len 2048 --d 64

test: .venv/installed
	$(VENV_PYTHON) -m pytest -n 3 --dist worksteal

bench: .venv/installed
	$(VENV_PYTHON) -m benchmarks.cpu_targets --json results/cpu_targets.json
	$(VENV_PYTHON) -m benchmarks.tables

notebooks: .venv/installed
	$(VENV_PYTHON) notebooks/build.py

docs: .venv/installed
	$(VENV_PYTHON) docs/build_api.py

release: .venv/installed
	$(VENV_PYTHON) checks/package.py --release

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis profiles
