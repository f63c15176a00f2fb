# Needs Python 3.10, make and a package registry; everything else goes to $(VENV).
PYTHON ?= python3.10
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := output/shapes_mask_rcnn_R_18_FPN_mabn

.PHONY: setup demo test test-fast clean

setup: $(VENV)/.complete

# The lock file pins every package, so its change and nothing else makes a new environment.
$(VENV)/.complete: requirements.lock setup.py
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check "setuptools<81" wheel
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Trains a small Mask R-CNN with MABN on two images per step and evaluates it.
demo: export DETECTRON2_DATASETS = datasets
demo: setup
	test -d datasets/shapes || $(RUN) tools/make_synthetic_coco.py datasets --train 1000 --val 200
	$(RUN) tools/train_net.py --resume \
		--config-file configs/quick_schedules/shapes_mask_rcnn_R_18_FPN_mabn.yaml OUTPUT_DIR $(DEMO)
	$(RUN) tools/report.py $(DEMO)

test: setup
	$(RUN) -m pytest

test-fast: setup
	$(RUN) -m pytest -m "not slow"

clean:
	rm -rf $(VENV) output datasets/shapes
