# Two commands set up everything from nothing: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test bench lint sanitize gpu gpu-sanitize clean

# torch first and alone, by the constraints file: a wider range would fetch gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt ctp_kernels/_build.py $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e ".[test,bench,dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/ctp demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench/ --benchmark

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (GCC; minutes).
sanitize: $(VENV)/.installed
	CTP_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest -q tests/test_cpu.py tests/test_cpu_int8.py

# On a machine with a GPU where Python, torch, triton and pytest are installed already; needs no network. The tests run
# side by side where pytest-xdist is there, the benchmarks never.
gpu:
	$(PYTHON) -m ctp_kernels._build
	$(PYTHON) -m pytest tests -m gpu $$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8")
	$(PYTHON) -m pytest bench/ --benchmark -m gpu

gpu-sanitize:
	compute-sanitizer --error-exitcode 1 \
		$(PYTHON) -m pytest tests/test_cuda.py tests/test_triton.py -m gpu -k "test_on_a_gpu and not layer"

clean:
	rm -rf $(VENV) build dist *.egg-info ctp_kernels/lib runs
