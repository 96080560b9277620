# make run | make test | make lab | make reports | make prepare. Each sets up .venv first where that is missing or old.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
BUDGET ?= full
SEEDS ?= 0 1 2

.PHONY: run test lab reports prepare install
run: install ## train the vision codec at budget=quick; print the result table, report and figures
	$(BIN)/puzzle run 01_vision_puzzle
# Two processes of one thread each: threads of two processes that share two cores wait for each other
test: install ## everything CI runs
	@$(BIN)/python tools/prepare.py --check
	@$(BIN)/ruff check . || { echo 'mend with: .venv/bin/ruff check --fix .'; exit 1; }
	@OMP_NUM_THREADS=1 PUZZLE_RUNS=$$(mktemp -d) $(BIN)/nbdev_test --timing --n_workers 2 || { echo 'mend with: open the notebook named above (make lab), fix the cell, make prepare'; exit 1; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 || { echo 'mend with: .venv/bin/python -m pytest --lf -x'; exit 1; }
lab: install ## JupyterLab with the kernel registered
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name python3
	$(BIN)/jupyter lab nbs
reports: install ## run every system at BUDGET for every seed of SEEDS (finished runs are kept, broken ones resumed), publish
	$(BIN)/python tools/reports.py --budget $(BUDGET) --seeds $(SEEDS)
prepare: install ## export, refresh outputs of changed notebooks, clean, render README: all that a commit needs
	$(BIN)/python tools/prepare.py
install: .venv/.installed
.venv/.installed: pyproject.toml requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.txt -e '.[dev]' 2> >(grep -v '^WARNING: Location' >&2)
	@touch $@
