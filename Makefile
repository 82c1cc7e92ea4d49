# The targets make .venv by themselves: no activated environment, no question asked.
#
#   make test ARGS="-k dropout"                 passes options on, here to pytest
#   make train ARGS="--trainer.max_epochs 3"    passes them to scripts/train.py  # mlp only
#   make train-gpt ARGS="--trainer.max_steps 9" passes them to scripts/train.py  # gpt only
#   make test PYTHON=python3.12                 picks the interpreter, which later calls remember
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
#                                               takes torch without CUDA, a tenth of the download

# The interpreter that .venv was made with, where there is one.
PYTHON ?= $(shell p=$$(sed -n 1p .venv/made-with 2>/dev/null); command -v "$$p" || echo python3)

# Says which interpreter and directory .venv belongs to; fails where pyproject.toml's requires-python would.
OWNER := import ensurepip, os, sys, venv; (3, 11) <= sys.version_info < (3, 14) or sys.exit(1); \
         print(os.path.realpath(sys.executable), os.getcwd(), sep="\n")

# -I and --no-user keep PYTHONPATH, user site packages and pip's own settings out of .venv.
INSTALL := .venv/bin/python -I -m pip install --disable-pip-version-check --no-user -c constraints.txt
unexport PIP_TARGET PIP_PREFIX

# What a person reads to understand a run, from its config to its predictions.
READ_FIRST := scripts/train.py src/thinned/cli.py src/thinned/tasks/*.py src/thinned/models/*.py
READ_FIRST += src/thinned/evaluation/ways.py src/thinned/uncertainty/monte_carlo.py
READ_FIRST += src/thinned/data/images.py  # mlp only

PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# mlp only: begin
train: .venv/installed ## Train, test and predict with configs/mlp_digits.yaml; ARGS="--key value" changes settings
	.venv/bin/python scripts/train.py --config configs/mlp_digits.yaml $(ARGS)

evaluate: .venv/installed ## Evaluate the latest run on digits, shifted digits and letters; train it first if there is none
	@ls runs/mlp_digits/*/checkpoints/best.ckpt >/dev/null 2>&1 || $(MAKE) train ARGS=
	.venv/bin/python scripts/evaluate.py --ckpt_path $$(ls -t runs/mlp_digits/*/checkpoints/best.ckpt | head -1) \
	    --sets configs/evaluation/image_shifts.yaml $(ARGS)

# mlp only: end
# gpt only: begin
train-gpt: .venv/installed ## Train a GPT on the Python reference with configs/gpt_pydocs.yaml, and print coloured samples
	.venv/bin/python scripts/train.py --config configs/gpt_pydocs.yaml $(ARGS)

evaluate-gpt: .venv/installed ## Evaluate the latest run on the Python reference, shifted text and code; train it first if there is none
	@ls runs/gpt_pydocs/*/checkpoints/best.ckpt >/dev/null 2>&1 || $(MAKE) train-gpt ARGS=
	.venv/bin/python scripts/evaluate.py --ckpt_path $$(ls -t runs/gpt_pydocs/*/checkpoints/best.ckpt | head -1) \
	    --sets configs/evaluation/text_shifts.yaml $(ARGS)

# gpt only: end
doctor: .venv/installed ## Say which known traps apply on this machine, and how to mend them
	.venv/bin/python scripts/doctor.py

test: .venv/installed-dev ## Run the tests, one process per core with one thread each; ARGS goes to pytest
	$(PYTEST) -m "not slow" $(ARGS)

test-all: test ## Run the slow tests too: several processes, killed runs
	$(PYTEST) -m slow $(ARGS)

lint: .venv/installed-dev ## Check style, format, types and the Dockerfile
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/hadolint .devcontainer/Dockerfile

format: .venv/installed-dev ## Order imports and wrap lines, as `make lint` expects
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

lines: ## Count the lines of src by folder, in total, and of the files to read first
	@wc -l $(wildcard src/*/*.py src/*/*/*.py) | awk -F / '/total$$/ { next } { n = $$0 + 0; all += n; \
	    room = NF > 3 ? $$3 "/" : $$3; if (!(room in lines)) rooms[++count] = room; lines[room] += n } \
	    END { for (i = 1; i <= count; i++) printf "%6d  %s\n", lines[rooms[i]], rooms[i]; printf "%6d  src\n", all }'
	@wc -l $(wildcard $(READ_FIRST)) | awk 'END { printf "%6d  to read first (READ_FIRST in the Makefile)\n", $$1 }'

clean: ## Remove .venv and caches; runs/ stays
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
	find src scripts tests -name __pycache__ -prune -exec rm -rf {} +

# Made again if it is missing, unfinished, moved, or of another Python.
.venv/made-with: FORCE
	@owner=$$("$(PYTHON)" -c '$(OWNER)' 2>/dev/null) || { \
	    echo "Expected Python 3.11 to 3.13 with venv, but got $(PYTHON):" \
	         "$$("$(PYTHON)" --version 2>&1 | head -n 1); set PYTHON=..." >&2; exit 1; }; \
	if [ "$$owner" != "$$(cat $@ 2>/dev/null)" ]; then \
	    echo "Making .venv with $(PYTHON); this takes some minutes, once."; \
	    "$(PYTHON)" -m venv --clear .venv && printf '%s\n' "$$owner" > $@; fi

.venv/installed: .venv/made-with pyproject.toml constraints.txt
	$(INSTALL) --editable '.[report]' && touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable '.[dev]' && touch $@

FORCE:
.PHONY: help doctor test test-all lint format lines clean FORCE
.PHONY: train evaluate  # mlp only
.PHONY: train-gpt evaluate-gpt  # gpt only
