"""Files in the format of Fashion-MNIST."""

import numpy as np


def write_idx(path, values):
    """The format of MNIST: a magic number, the dimensions and the values, most significant byte first."""
    header = [0x0800 + values.ndim, *values.shape]
    path.write_bytes(b"".join(n.to_bytes(4, "big") for n in header) + values.tobytes())


def write_fashion_mnist(root, train, val):
    rng = np.random.default_rng(0)
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", train), ("t10k", val)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels)
