# Needs make, a package registry and Python. Everything else goes to the environment of a stack:
# - newest: a Python from 3.11 up, a current PyTorch and Detectron2's Python code;
# - compiled: Python 3.10, and Detectron2 with its operators.
# `make`'s targets use the newest where such a Python is there, otherwise, or with STACK=compiled, the other.
# Another Python: make PYTHON_NEWEST=/path/to/python, PYTHON_COMPILED=/path/to/python3.10.

# The first of these Pythons that runs and can make environments. Under pyenv there is a command for every
# version that is installed, which fails unless its version is chosen.
find_python = $(shell for version in $(1); do PYENV_VERSION=$$version:system python$$version -c \
	'import ensurepip, sys, venv; sys.version_info.minor < $(2) and sys.exit(1); print(sys.executable)' \
	2>/dev/null && break; done)
ifndef PYTHON_NEWEST
PYTHON_NEWEST := $(call find_python,3.11 3.12 3.13 3.14 3,11)
endif
ifndef PYTHON_COMPILED
PYTHON_COMPILED := $(call find_python,3.10,10)
endif
STACK ?= $(if $(PYTHON_NEWEST),newest,compiled)

PYTHON_newest = $(PYTHON_NEWEST)
PYTHON_compiled = $(PYTHON_COMPILED)
NEEDS_newest := Python 3.11 or later: make PYTHON_NEWEST=/path/to/python
NEEDS_compiled := Python 3.10: make PYTHON_COMPILED=/path/to/python3.10
LOCK_newest := requirements-newest.lock
LOCK_compiled := requirements.lock
ENVIRONMENT_newest := .venv-newest
ENVIRONMENT_compiled := .venv
RUN = $(ENVIRONMENT_$(STACK))/bin/python
PIP = -m pip install --quiet --disable-pip-version-check --no-deps
# Tests of one file share what is slow to make, and stay in one process.
PYTEST := -m pytest --numprocesses 2 --dist loadfile

DEMO := shapes_mask_rcnn_R_26_FPN_mabn
CLASSIFIER := output/fashion_mnist_resnet18_mabn_2
SHAPES_MABN := configs/quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn.yaml
TRANSFER := output/shapes_mask_rcnn_R_18_FPN_mabn_transfer
# The recipe scales to the GPUs that are there; on the CPU it has one worker per core of two.
GPUS = import torch; print(min(2, torch.cuda.device_count()) or 2)

.PHONY: setup setup-newest setup-compiled demo transfer test test-newest test-compiled test-fast test-fast-newest test-fast-compiled \
	test-dry-gpu test-dry-gpu-newest test-dry-gpu-compiled gpu gpu-rehearsal gpu-bundle lint format dist \
	datasets/fashion-mnist clean
.DELETE_ON_ERROR:

setup: setup-$(STACK)

# What an environment holds stands in the names of two empty files in it, which are written last: of the
# lock, whose change makes a new environment, and of the package's metadata, whose change installs it again.
define environment
LOCKED_$(1) := $(ENVIRONMENT_$(1))/.locked-$(firstword $(shell cksum $(LOCK_$(1))))
INSTALLED_$(1) := $(ENVIRONMENT_$(1))/.installed-$(firstword $(shell cat setup.py pyproject.toml | cksum))

setup-$(1): $$(INSTALLED_$(1))

$$(LOCKED_$(1)):
	@test -n "$$(PYTHON_$(1))" || { echo "Needs $$(NEEDS_$(1))" >&2; exit 1; }
	$$(PYTHON_$(1)) -m venv --clear $$(@D)
	$$(@D)/bin/python $$(PIP) -r $$(LOCK_$(1))
	$$(detectron2_$(1))
	touch $$@

$$(INSTALLED_$(1)): $$(LOCKED_$(1))
	$$(@D)/bin/python $$(PIP) --no-build-isolation --editable .
	rm -f $$(@D)/.installed-*
	touch $$@
endef

# The compiled stack's wheel; its operators are for another Python and PyTorch.
define detectron2_newest
site=$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
$(@D)/bin/python $(PIP) --target "$$site" --python-version 3.10 --only-binary=:all: \
	$(shell grep ^sal-detectron2== $(LOCK_compiled)) && rm "$$site"/detectron2/_C*.so
endef

$(eval $(call environment,newest))
$(eval $(call environment,compiled))

# Without these, memory goes back to the system after each step and is asked for again in the next.
demo transfer: export MALLOC_MMAP_MAX_ = 0
demo transfer: export MALLOC_TRIM_THRESHOLD_ = 20000000000
demo transfer: export DETECTRON2_DATASETS = datasets

# Trains a small Mask R-CNN with MABN on two images per worker and evaluates it.
demo: setup datasets/shapes_alike
	$(RUN) tools/train_net.py --resume --num-gpus $$($(RUN) -c "$(GPUS)") \
		--config-file configs/quick_schedules/$(DEMO).yaml OUTPUT_DIR output/$(DEMO)
	$(RUN) tools/report.py output/$(DEMO)

# Trains a classifier on real images, and from its backbone a Mask R-CNN.
transfer: setup datasets/shapes datasets/fashion-mnist
	$(RUN) tools/lazyconfig_train_net.py --resume \
		--config-file configs/FashionMNIST/resnet18_mabn_2.py train.output_dir=$(CLASSIFIER)
	test -f $(CLASSIFIER)/weights.pth || \
		$(RUN) tools/convert_weights.py $(CLASSIFIER)/model_final.pth $(CLASSIFIER)/weights.pth \
		--from detectron2 --config-file $(SHAPES_MABN)
	$(RUN) tools/train_net.py --resume --config-file $(SHAPES_MABN) \
		MODEL.WEIGHTS $(CLASSIFIER)/weights.pth OUTPUT_DIR $(TRANSFER)
	$(RUN) tools/report.py $(TRANSFER)

datasets/shapes: | setup
	$(RUN) tools/make_synthetic_coco.py datasets --train 1000 --val 200

datasets/shapes_alike: | setup
	$(RUN) tools/make_synthetic_coco.py datasets --train 8000 --val 300 --workers 2 --variety alike

# The three varieties of the data of configs/study/shapes.yaml: DETECTRON2_DATASETS=datasets/study.
datasets/study: | setup
	for variety in looks content alike; do \
		$(RUN) tools/make_synthetic_coco.py $@ --train 8000 --val 300 --workers 2 --variety $$variety || exit 1; \
	done

test: test-$(STACK)

test-newest test-compiled: test-%: setup-%
	$(ENVIRONMENT_$*)/bin/python $(PYTEST)

test-fast: test-fast-$(STACK)

test-fast-newest test-fast-compiled: test-fast-%: setup-%
	$(ENVIRONMENT_$*)/bin/python $(PYTEST) -m "not slow"

# The code for CUDA on a GPU that is not there, see tests/dry_gpu/README.md.
test-dry-gpu: test-dry-gpu-newest test-dry-gpu-compiled
test-dry-gpu-newest test-dry-gpu-compiled: test-dry-gpu-%: setup-%
	$(ENVIRONMENT_$*)/bin/python -m tests.dry_gpu test

# All measurements on a GPU, or one STAGE of them, with the given PYTHON; docs/gpu.md.
gpu: PYTHON ?= python3
gpu: OUT ?= output/gpu
gpu:
	PYTHONPATH=.:gpu-bundle:$$PYTHONPATH $(PYTHON) tools/benchmark_gpu.py $(STAGE) --out $(OUT) \
		$(if $(RELEASE),--release $(RELEASE)) $(if $(filter tiny,$(SIZE)),--tiny)

# Their whole course in small, on a GPU that is not there. It has no results for Triton's kernels, which
# therefore are only launched, in a run of their own.
gpu-rehearsal: export OMP_NUM_THREADS = 1
gpu-rehearsal: export PYTHONPATH = .
gpu-rehearsal: setup-newest
	rm -rf output/gpu-rehearsal
	MABN_D2_TRITON=0 $(ENVIRONMENT_newest)/bin/python -m tests.dry_gpu run --compute \
		tools/benchmark_gpu.py --tiny --out output/gpu-rehearsal
	$(ENVIRONMENT_newest)/bin/python -m tests.dry_gpu run \
		tools/benchmark_gpu.py layers --tiny --out output/gpu-rehearsal/triton

# What `make gpu` needs beyond PyTorch, torchvision and OpenCV, for a machine without a package registry.
BUNDLE_PYTHON ?= 3.12
BUNDLE_MIB := 60
BUNDLED := antlr4-python3-runtime cloudpickle fvcore iopath omegaconf portalocker tabulate termcolor tqdm yacs
BUNDLED_COMPILED := pycocotools PyYAML
pins = $(foreach name,$(1),$(shell grep ^$(name)== $(LOCK_newest)))

gpu-bundle: setup-newest
	rm -rf $@
	$(ENVIRONMENT_newest)/bin/python $(PIP) --target $@ $(call pins,$(BUNDLED))
	$(ENVIRONMENT_newest)/bin/python $(PIP) --target $@ --python-version $(BUNDLE_PYTHON) --only-binary=:all: \
		$(call pins,$(BUNDLED_COMPILED))
	$(ENVIRONMENT_newest)/bin/python $(PIP) --target $@ --python-version 3.10 --only-binary=:all: \
		$(shell grep ^sal-detectron2== $(LOCK_compiled))
	rm -f $@/detectron2/_C*.so
	@size=$$(du -s --block-size=1M $@ | cut -f 1); echo "$@: $$size MiB"; test "$$size" -le $(BUNDLE_MIB)

lint: setup-newest
	$(ENVIRONMENT_newest)/bin/ruff check
	$(ENVIRONMENT_newest)/bin/ruff format --check
	$(ENVIRONMENT_newest)/bin/mypy

format: setup-newest
	$(ENVIRONMENT_newest)/bin/ruff check --fix
	$(ENVIRONMENT_newest)/bin/ruff format

# The wheel and the source distribution. The wheel is tried in an environment of its own.
dist: setup-newest
	rm -rf dist
	$(ENVIRONMENT_newest)/bin/python -m build --no-isolation
	$(ENVIRONMENT_newest)/bin/python .ci/try_wheel.py dist/*.whl

# The four files of Fashion-MNIST, from Debian's package; nothing is installed. They appear together.
datasets/fashion-mnist: datasets/FashionMNIST/raw
datasets/FashionMNIST/raw:
	@command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo \
		"Needs apt-get and dpkg-deb. Without: unpack the four .gz files of Fashion-MNIST" \
		"(https://github.com/zalandoresearch/fashion-mnist) into $@" >&2; exit 1; }
	@set -e; mkdir -p datasets; \
	partial=$$(mktemp -d "$(CURDIR)/datasets/.fashion-mnist.XXXXXX"); \
	trap 'rm -rf "$$partial"' EXIT; trap 'exit 1' INT TERM; \
	cd "$$partial"; \
	apt-get download -qq dataset-fashion-mnist || { echo \
		"apt-get found no package dataset-fashion-mnist: try apt-get update first" >&2; exit 1; }; \
	dpkg-deb -x dataset-fashion-mnist_*.deb .; \
	gunzip usr/share/datasets/fashion-mnist/*.gz; \
	mkdir -p ../FashionMNIST; mv -T usr/share/datasets/fashion-mnist ../FashionMNIST/raw

clean:
	rm -rf $(ENVIRONMENT_newest) $(ENVIRONMENT_compiled) dist output gpu-bundle datasets/shapes datasets/study
