# Needs Python 3.10, make and a package registry; everything else goes to $(VENV).
PYTHON ?= python3.10
VENV := .venv
RUN := $(VENV)/bin/python

SHAPES_MABN := configs/quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn.yaml
DEMO := output/shapes_mask_rcnn_R_18_FPN_mabn
CLASSIFIER := output/fashion_mnist_resnet18_mabn_2
TRANSFER := $(DEMO)_transfer

# The newest stack: another Python and PyTorch, and Detectron2's Python code without its operators.
PYTHON_NEWEST ?= python3.11
NEWEST := .venv-newest
RUN_NEWEST := $(NEWEST)/bin/python

PIP_OPTIONS := --quiet --disable-pip-version-check

.PHONY: setup demo transfer test test-fast test-newest \
	test-dry-gpu test-dry-gpu-compiled test-dry-gpu-newest datasets/fashion-mnist clean

setup: $(VENV)/.complete

# The lock file pins every package, so its change and nothing else makes a new environment.
$(VENV)/.complete: requirements.lock setup.py
	@$(PYTHON) -c "" || { echo "Needs Python 3.10: make PYTHON=/path/to/python3.10" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install $(PIP_OPTIONS) "setuptools<81" wheel
	$(RUN) -m pip install $(PIP_OPTIONS) --no-deps -r requirements.lock
	$(RUN) -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation -e .
	touch $@

# Without these, memory goes back to the system after each step and is asked for again in the next.
demo transfer: export MALLOC_MMAP_MAX_ = 0
demo transfer: export MALLOC_TRIM_THRESHOLD_ = 20000000000
demo transfer: export DETECTRON2_DATASETS = datasets

# Trains a small Mask R-CNN with MABN on two images per step and evaluates it.
demo: setup datasets/shapes
	$(RUN) tools/train_net.py --resume --config-file $(SHAPES_MABN) OUTPUT_DIR $(DEMO)
	$(RUN) tools/report.py $(DEMO)

# Trains a classifier on real images, and from its backbone the demo's Mask R-CNN by the demo's schedule.
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

test: setup
	$(RUN) -m pytest

test-fast: setup
	$(RUN) -m pytest -m "not slow"

test-newest: $(NEWEST)/.complete
	$(RUN_NEWEST) -m pytest -m "not slow"

# The code for CUDA on a GPU that is not there, see tests/dry_gpu/README.md.
test-dry-gpu: test-dry-gpu-compiled test-dry-gpu-newest
test-dry-gpu-compiled: setup
	$(RUN) -m tests.dry_gpu test
test-dry-gpu-newest: $(NEWEST)/.complete
	$(RUN_NEWEST) -m tests.dry_gpu test

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

$(NEWEST)/.complete: requirements-newest.lock setup.py
	@$(PYTHON_NEWEST) -c "" || \
		{ echo "Needs Python 3.11: make test-newest PYTHON_NEWEST=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON_NEWEST) -m venv --clear $(NEWEST)
	$(RUN_NEWEST) -m pip install $(PIP_OPTIONS) --no-deps -r requirements-newest.lock
	site=$$($(RUN_NEWEST) -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	$(RUN_NEWEST) -m pip install $(PIP_OPTIONS) --no-deps --target "$$site" \
		--python-version 3.10 --only-binary=:all: sal-detectron2==0.7.2 && \
	rm "$$site"/detectron2/_C*.so
	$(RUN_NEWEST) -m pip install $(PIP_OPTIONS) --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) output datasets/shapes
