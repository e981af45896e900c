# make demo, make test, make check: all a fresh machine needs is Python 3.11 or newer and make.
PYTHON ?= python3

# Not to be given from outside: what is named here is removed and made anew when it looks incomplete.
override VENV := .venv
override BIN := $(VENV)/bin
override STAMP := $(VENV)/.complete
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --constraint constraints.txt

# The stamp is written last and names this folder. An environment without it was interrupted; one that names another
# folder was moved; one whose Python is gone or replaced does not find torch. All three are made anew.
SOUND := $(shell test "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" && cd / && "$(CURDIR)/$(BIN)/python" -I -c \
	'import importlib.util as u; print("yes" if all(map(u.find_spec, ("torch", "curvepress"))) else "")' 2>/dev/null)

.PHONY: help demo test check docs bench format clean anew
help:
	@echo 'make demo     compress the model of handwritten digits to half its parameters; results in runs/digits'
	@echo 'make test     run the tests'
	@echo 'make check    style, types, sizes of functions and files'
	@echo 'make docs     run what the documentation shows and follow its links'
	@echo 'make bench    the measurements behind the figures of the README: hours; goes on where it stopped; needs CURVEPRESS_DATA'
	@echo 'make format   let ruff mend style and layout'
	@echo 'make clean    remove the environment, builds and caches'
	@echo 'The first of them makes $(VENV) (PYTHON=... chooses the interpreter) and installs what is needed.'

demo: $(STAMP)
	$(BIN)/curvepress compress digits --params 0.5 --multiple 8 --out runs/digits

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python scripts/house.py

docs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_readme.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.cifar10 measure --depth 20 --seeds 0 1 --shares 0.5 0.3
	$(BIN)/python -m benchmarks.cifar10 measure --depth 56
	$(BIN)/python -m benchmarks.cifar10 latency
	$(BIN)/python -m benchmarks.cifar10 widths
	$(BIN)/python -m benchmarks.stages run
	$(BIN)/python -m benchmarks.coverage run
	$(BIN)/python -m benchmarks.coverage large
	for depth in 20 56; do for what in reference measure ehap equality processes; do \
		$(BIN)/python -m benchmarks.curvature $$what --depth $$depth || exit 1; done; done
	$(BIN)/python -m benchmarks.curvature table
	$(BIN)/python -m benchmarks.cifar10 table
	$(BIN)/python -m benchmarks.stages table
	$(BIN)/python -m benchmarks.coverage table

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch comes first and alone: its wheel is chosen by the machine's own pip configuration.
$(STAMP): pyproject.toml constraints.txt $(if $(SOUND),,anew)
	@rm -f $@
	@echo 'installing torch $(TORCH) (a large wheel: minutes, the first time)'
	@$(PIP) torch==$(TORCH)
	@echo 'installing curvepress and what it needs'
	@$(PIP) --editable '.[cifar10,transformers,bench,dev]'
	@cd / && '$(CURDIR)/$(BIN)/python' -I -c 'import curvepress, torch'
	@echo '$(CURDIR)' > $@

anew:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'curvepress needs Python 3.11 or newer and $(PYTHON) is not; name one that is: make PYTHON=python3.12 ...'; exit 1; }
	@echo 'making $(VENV) with' "$$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
