import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "mabn_d2/__init__.py").read_text()).group(1)

setup(
    name="mabn-d2",
    version=version,
    description="Moving Average Batch Normalization (MABN) for Detectron2",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mabn_d2", "mabn_d2.*"]),
    python_requires=">=3.8",
    install_requires=["torch", "torchvision", "fvcore", "pycocotools", "opencv-python"],
    extras_require={
        # Upstream Detectron2 of April 2024, compiled for Python 3.10 and torch 2.3.
        "detectron2": [
            "sal-detectron2==0.7.2; python_version=='3.10'",
            "torch==2.3.1; python_version=='3.10'",
            "torchvision==0.18.1; python_version=='3.10'",
            "numpy<2",
            "setuptools<81",
        ],
        "dev": ["pytest", "hypothesis", "matplotlib", "tensorboard"],
    },
)
