# Short names for the commands of README.md.
PYTHON ?= python3

.PHONY: faces test lint figures

faces:
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q -r requirements.txt
	.venv/bin/python train.py && .venv/bin/python sample.py

test:
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q -r requirements-dev.txt
	.venv/bin/python -m pytest

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

# make figures RUNS="runs/faces-<time> runs/ffhq-64-<time> runs/mnist-<time>"
figures:
	.venv/bin/python -m figures.make_figures $(RUNS)
