# Everything below works in a fresh clone: the first target that needs packages makes .venv and installs them.
# Recipes call Python and nothing else, so that they run under sh and under cmd.exe alike.
#
# Without make (on Windows .venv\Scripts\python in place of .venv/bin/python):
#     python3 -m venv .venv
#     .venv/bin/python -m pip install -r requirements.txt
#     .venv/bin/python -m jupyterlab notebooks/00_tour.ipynb
#     .venv/bin/python -m pytest @tests/notebooks/nbval.args notebooks tests

ifeq ($(OS),Windows_NT)
  PYTHON ?= python
  PY := .venv/Scripts/python
else
  PYTHON ?= python3
  PY := .venv/bin/python
endif
STAMP := .venv/installed

# How many tests (or notebooks) run at a time, one thread each.
WORKERS ?= 2
# Notebooks to execute or to check, e.g. NB=notebooks/02_*.ipynb; all of them when empty.
NB ?=
# More options for the command behind lab, test, check, gpu, bench and figures, e.g. ARGS=--no-browser.
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# The kernel "python3" is the one in .venv, also where the user's home or JUPYTER_PATH holds another of that name.
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH
# Packages come from .venv alone.
unexport PYTHONPATH
unexport PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help lab test check test-slow test-kernels gpu notebooks figures bench lint install

help:
	@echo "make lab        open the course in JupyterLab; ARGS=--no-browser prints the address instead"
	@echo "make test       all unit tests, then every notebook executed and compared with its stored outputs"
	@echo "make check      the notebooks alone; NB=notebooks/02_*.ipynb for some of them"
	@echo "make test-slow  tests left out of make test: build and install a wheel, the GPU benchmark's dry run"
	@echo "make test-kernels  compile every Triton kernel for every target, without a GPU; takes an hour or more, goes on"
	@echo "make gpu        on a machine with a GPU: its tests and the benchmark; writes figures/data/gpu and README's table"
	@echo "make notebooks  execute the notebooks in place; NB=notebooks/02_*.ipynb for some of them"
	@echo "make figures    redraw figures/*.png, and write the results in README.md and figures/README.md, from the numbers in figures/data"
	@echo "make bench      time the model on this CPU"
	@echo "make lint       ruff: rules and format, notebooks too"
	@echo "make install    make .venv and install requirements.txt; the targets above do so when needed"
	@echo "Python 3.11 or newer is needed; choose one with PYTHON=python3.12"

lab: $(STAMP)
	$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=lab/tree/notebooks/00_tour.ipynb $(ARGS)

test: $(STAMP)
	$(PY) -m pytest @tests/notebooks/nbval.args notebooks tests -n $(WORKERS) --dist loadscope --no-loadscope-reorder \
		--durations=10 $(ARGS)

check: $(STAMP)
	$(PY) tests/notebooks/lessons.py check $(NB)
	$(PY) -m pytest @tests/notebooks/nbval.args tests/conftest.py $(or $(NB),notebooks) -n $(WORKERS) --dist loadscope $(ARGS)

test-slow: $(STAMP)
	$(PY) -m pytest -m slow $(ARGS)

# Rows that are kept and still true are not compiled again.
test-kernels: $(STAMP)
	$(PY) -m vwn_ref.kernels.aot --jobs $(WORKERS) --out figures/data/gpu/aot.json $(ARGS)
	$(PY) -m vwn_ref.kernels.report --notes kernels/NOTES.md

gpu: $(STAMP)
	$(PY) tests/kernels/on_gpu.py $(ARGS)

notebooks: $(STAMP)
	$(PY) tests/notebooks/lessons.py execute $(NB)

figures: $(STAMP)
	$(PY) -m vwn_ref.experiments.plots $(ARGS)
	$(PY) -m vwn_ref.experiments.readme --root .

bench: $(STAMP)
	$(PY) -m vwn_ref.experiments.bench_cpu $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

install: $(STAMP)

# The stamp is written last, so that an interrupted installation is taken up again. The first line has to be readable
# for any Python, which is why it is one expression.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vwn_ref needs Python 3.11 or newer and this is %s; choose another one: make PYTHON=python3.12' % sys.version.split()[0] or 0)"
	@$(PYTHON) -c "import sys, importlib.util as u; sys.exit(0 if u.find_spec('venv') and u.find_spec('ensurepip') else 'this Python cannot make virtual environments; on Debian and Ubuntu install the package python3-venv')"
	@echo "Installing requirements.txt into .venv; the first time takes a few minutes."
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	@$(PY) -c "open('$(STAMP)', 'w').close()"
