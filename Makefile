# Two commands do everything: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
new = $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), \
	"bcd needs Python 3.11 or newer: make PYTHON=python3.12"' && $(PYTHON) -m venv $(VENV)
# uv is the faster one. It does not read pip's settings, so where it fails, pip does it.
install = ($(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python $(1)) || $(PIP) $(1)
# Modules are compiled once, when they are first imported, and not by each of the processes that Ray starts.
unexport PYTHONDONTWRITEBYTECODE

# A test that hangs costs its process and fails, with the place where each of its threads was.
HANGS := -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

.PHONY: demo check pure test test-all lint docs env requirements clean

demo: $(VENV)/installed  ## generate synthetic images, train on them, evaluate, show where the report is
	$(BIN)/python jobs/demo.py

check: $(VENV)/installed-dev  ## lint, types, the site, and the tests that need no other process
	+$(MAKE) --no-print-directory --jobs 2 lint docs pure

pure: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(HANGS) -m 'not process and not ray and not browser and not trial'

test: $(VENV)/installed-dev lint  ## lint, types, and the tests that people run
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(HANGS) --durations=25

test-all: $(VENV)/installed-dev lint  ## everything, the long trials too: hours
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m '' --durations=25

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-dev  ## the documentation site, in site/; fails on a broken link, needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

requirements: $(VENV)/installed-dev  ## the hashes of what images and the nodes of cluster.yaml install
	$(BIN)/uv pip compile --quiet pyproject.toml --extra aws --constraints constraints.txt --generate-hashes \
		--python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate \
		--no-emit-index-url --output-file deploy/requirements.txt

env: $(VENV)/installed-dev  ## the environment for development

$(VENV)/installed: pyproject.toml constraints.txt
	$(new)
	$(call install,-c constraints.txt -e .)
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(new)
	$(call install,-c constraints.txt -e '.[dev]')
	$(call install,-c constraints.txt --no-deps --target $(VENV)/openvino openvino)
	touch $(VENV)/installed $@

clean:  ## remove the environment and what the demo made
	rm -rf $(VENV) demo
