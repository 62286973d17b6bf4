# Two commands do all the set-up on a machine with Rust and Python 3.10+:
#
#   make demo    the main job: a small LM in NF4, fine-tuned with LoRA, saved, reloaded
#   make test    everything that passes without a GPU
#
# with a GPU:
#   make test-gpu    the suites on it, compute-sanitizer where it is installed
#   make bench-gpu   against upstream bitsandbytes
#
# also: check · bench · curves · paged · distributed-curves · two-hosts · docs · kernels · upstream-env · check-aarch64 · miri · fuzz · clean

PYTHON  ?= python3
VENV    := .venv
PEER    := .venv-upstream
PY      := $(VENV)/bin/python
UV      := $(VENV)/bin/uv
STAMPS  := .stamps
SOURCES := Cargo.toml Cargo.lock pyproject.toml \
           $(shell find crates/halfbyte/src crates/halfbyte-gpu/src crates/halfbyte-gpu/kernels \
                   crates/halfbyte-gpu/build.rs crates/halfbyte-torch python -type f \
                   -not -name '*.pyc' -not -path '*/target/*' 2>/dev/null)
# From PyPI: the compilers of the GPU kernels in the wheel, and an OpenCL for the tests. Where a
# platform has none of them, kernels are compiled at run time and the tests say what they left out.
SITE      = $(CURDIR)/$(VENV)/lib/python3*/site-packages
ZIG       = $(firstword $(wildcard $(SITE)/ziglang/zig))
COMPILERS = NVRTC_LIB="$(firstword $(wildcard $(SITE)/nvidia/cuda_nvrtc/lib/libnvrtc.so.12))" \
            SPIRV_CLANG="$(if $(ZIG),$(ZIG) clang)" \
            HALFBYTE_OPENCL="$(firstword $(wildcard $(SITE)/pyopencl/.libs/libpocl*.so))"

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-rust test-emulated test-python test-parity test-gpu bench-gpu kernels check check-aarch64 miri fuzz bench curves paged \
        distributed-curves two-hosts docs \
        install upstream-env clean
.DEFAULT_GOAL := test

# --- set-up, each step once ---------------------------------------------------------------------

$(STAMPS)/venv: requirements/dev.txt
	@mkdir -p $(STAMPS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "halfbyte needs Python 3.10 or later; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@test -x $(UV) || $(PY) -m pip install --quiet uv
	@echo "installing PyTorch and the test clients into $(VENV) (about 3 GB, once)"
	@$(UV) pip install --quiet --compile-bytecode --python $(PY) -r requirements/dev.txt
	@touch $@

# The wheel as a user would build it, and the drop-in beside it.
$(STAMPS)/install: $(STAMPS)/venv $(SOURCES)
	@command -v cargo >/dev/null || { echo "halfbyte is built with Rust: install a toolchain (rustup.rs) first"; exit 1; }
	@echo "building halfbyte (release)"
	@rm -rf target/wheels
	@mkdir -p target && $(COMPILERS) $(VENV)/bin/maturin build --release --out target/wheels --interpreter $(PY) \
	  >target/maturin.log 2>&1 || { cat target/maturin.log; exit 1; }
	@$(UV) pip install --quiet --python $(PY) --reinstall --no-deps target/wheels/*.whl ./python/bitsandbytes
	@$(PY) -m compileall -q $(SITE)/halfbyte # as pip does, and uv does not
	@touch $@

install: $(STAMPS)/install

$(STAMPS)/upstream: requirements/upstream.txt $(STAMPS)/venv
	@echo "installing upstream bitsandbytes into $(PEER) (the test oracle)"
	@test -x $(PEER)/bin/python || $(PYTHON) -m venv --without-pip $(PEER)
	@$(UV) pip install --quiet --python $(PEER)/bin/python -r requirements/upstream.txt
	@touch $@

upstream-env: $(STAMPS)/upstream

# --- the commands -------------------------------------------------------------------------------

ARGS ?=
demo: $(STAMPS)/install
	@$(PY) demo/demo.py $(ARGS)

test: test-rust test-emulated test-python test-parity

test-rust: $(STAMPS)/venv
	@$(COMPILERS) cargo test --quiet --workspace

# PyTorch's CUDA tensors over host memory, the kernels in the emulator: tests/gpu/conftest.py.
test-emulated: $(STAMPS)/install
	@$(COMPILERS) cargo build --quiet --package halfbyte-gpu-emulator
	@$(PY) -m pytest -q tests/gpu

test-python: $(STAMPS)/install
	@$(PY) -m pytest -q tests/python tests/clients tests/demo tests/distributed

# A fixed seed, so that CI is reproducible; any other: make test-parity SEED=random-number
SEED ?= 20261121
test-parity: $(STAMPS)/install $(STAMPS)/upstream
	@HALFBYTE_PARITY_SEED=$(SEED) $(PY) -m pytest -q tests/parity

# Everything on a GPU: the kernels, the suites, compute-sanitizer on the kernels' tests.
test-gpu: $(STAMPS)/install
	@scripts/test-gpu $(PY)

bench-gpu: $(STAMPS)/install $(STAMPS)/upstream
	@$(PY) bench/gpu.py $(ARGS)

check: $(STAMPS)/venv
	@cargo fmt --all --check
	@$(COMPILERS) cargo clippy --quiet --workspace --all-targets -- -D warnings
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@$(VENV)/bin/mypy --no-error-summary
	@scripts/check-aarch64
	@$(PY) scripts/nvrtc-check
	@$(PY) scripts/hip-check
	@echo "check: clean"

# After a change of a kernel: registers, stack and shared memory per architecture.
kernels: $(STAMPS)/venv
	@$(COMPILERS) cargo build --quiet -p halfbyte-gpu
	@$(PY) scripts/nvrtc-check --write

# Compiles and lints the NEON code, and runs its tests under qemu where that is installed.
check-aarch64:
	@scripts/check-aarch64 --test

# Needs the miri component of a nightly toolchain.
miri:
	@HALFBYTE_ISA=scalar cargo +nightly miri test -p halfbyte --lib

fuzz:
	@cd crates/halfbyte && cargo +nightly fuzz run quant_meta -- -max_total_time=60

bench: $(STAMPS)/install $(STAMPS)/upstream
	@$(PY) bench/run.py $(ARGS)

# docs/figures/{curves,rounding}.svg: about 15 minutes on two cores.
curves: $(STAMPS)/install $(STAMPS)/upstream
	@$(PY) models/train/compare_optimizers.py curves $(ARGS)
	@$(PY) models/train/compare_optimizers.py rounding $(ARGS)

# An optimizer whose state is four times a memory limit; needs the right to make a control group.
paged: $(STAMPS)/install
	@$(PY) bench/paged.py $(ARGS)

# docs/figures/distributed_curves.svg: training on 1, 2 and 4 ranks, about 20 minutes on two cores.
distributed-curves: $(STAMPS)/install
	@$(PY) bench/distributed.py curves $(ARGS)

# Bytes on the wire between two network namespaces; needs Linux, iproute2 and root.
two-hosts: $(STAMPS)/install
	@$(PY) bench/distributed.py hosts $(ARGS)

docs: $(STAMPS)/install
	@$(COMPILERS) RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps -p halfbyte -p halfbyte-gpu
	@$(PY) -m pdoc --output-directory docs/site halfbyte halfbyte.distributed >/dev/null
	@echo "Rust: target/doc/halfbyte/index.html, halfbyte_gpu   Python: docs/site/index.html   guide: docs/"

clean:
	@rm -rf target $(VENV) $(PEER) $(STAMPS) docs/site demo/out
