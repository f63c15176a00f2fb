"""Importing this module raises the one error that says how to install Detectron2, where it is missing."""

import importlib.util

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "This part of mabn_d2 needs Detectron2, which is not installed. For Python 3.10 and torch 2.3: "
        'pip install "setuptools<81" "numpy<2" sal-detectron2==0.7.2. For other versions see '
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
    )
