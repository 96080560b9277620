# Every target sets up .venv first where that is missing or older than what it is made from.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
BUDGET ?= full
SEEDS ?= 0 1 2
# Every process would compile torch anew; empty is as good as not set
export PYTHONDONTWRITEBYTECODE :=
# Two processes of one thread each: threads of two processes that share two cores wait for each other
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20

.PHONY: help run test test-all reliability lab docs reports reports-render prepare lock install
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18
run: install ## train the vision codec at budget=quick; print the result table, report and figures
	$(BIN)/puzzle run 01_vision_puzzle
# The parts; pytest runs the experiments, with `puzzle run`
NBDEV_TEST := OMP_NUM_THREADS=1 PUZZLE_RUNS=$$(mktemp -d) $(BIN)/nbdev_test --timing --n_workers 2 \
	--skip_file_re "$$(cd nbs && ls [0-9]*.ipynb | paste -sd '|')"
test: install ## everything CI runs
	@$(BIN)/python tools/prepare.py --check
	@$(BIN)/ruff check . || { echo 'mend with: .venv/bin/ruff check --fix .'; exit 1; }
	@$(BIN)/python tools/house.py
	@$(NBDEV_TEST) || { echo 'mend with: open the notebook named above (make lab), fix the cell, make prepare'; exit 1; }
	@$(TEST) || { echo 'mend with: .venv/bin/python -m pytest --lf -x'; exit 1; }
test-all: test ## the same, and what takes minutes
	@$(TEST) -m slow
reliability: install ## inject every fault, also what takes minutes, and write reports/reliability.md
	@rm -f reports/reliability.json
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m 'slow or not slow' --reliability
lab: install ## JupyterLab with the kernel registered
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name python3
	$(BIN)/jupyter lab nbs
docs: .venv/.docs ## build notebooks and reports as a site with a search, in build/site
	$(BIN)/python tools/docs.py
.venv/.docs: .venv/.installed
	@tools/install.sh docs
	@touch $@
reports: install ## run every system at BUDGET for every seed of SEEDS (finished runs are kept, broken ones resumed), publish
	$(BIN)/python tools/reports.py --budget $(BUDGET) --seeds $(SEEDS)
reports-render: install ## render the published reports again from their JSON
	$(BIN)/python -c 'from puzzle_research.core.publish import render_published as r; print(*r(), sep="\n")'
prepare: install ## export, refresh outputs of changed notebooks, clean, render README: all that a commit needs
	$(BIN)/python tools/prepare.py
lock: install ## write requirements.txt from what pyproject.toml installs here
	@tools/install.sh dev,docs
	$(BIN)/python tools/lock.py
install: .venv/.installed
.venv/.installed: pyproject.toml requirements.txt
	@PYTHON=$(PYTHON) tools/install.sh dev
	@OMP_NUM_THREADS=1 $(BIN)/python tools/compile.py
	@touch $@
