"""
Made the checkpoints and recorded.npz beside this file, with version 0.1.0.

In a checkout of that version, with ../../helpers/version_0_1_0.py and this file added:

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/data/v0.1.0/make.py OUTPUT
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tests.helpers.version_0_1_0 import (
    CHECKPOINT,
    CHECKPOINT_ITERS,
    RUNS,
    as_vector,
    outputs,
    register_images,
    train,
)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    recorded = {}
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        register_images(temporary)
        for run in RUNS:
            whole = train(run, temporary / run)
            checkpoint = folder / run / CHECKPOINT
            checkpoint.parent.mkdir(parents=True)
            checkpoint.write_bytes((temporary / run / CHECKPOINT).read_bytes())
            (checkpoint.parent / "last_checkpoint").write_text(CHECKPOINT)

            resumed_folder = temporary / f"{run}_resumed"
            resumed_folder.mkdir()
            for file in checkpoint.parent.iterdir():
                (resumed_folder / file.name).write_bytes(file.read_bytes())
            resumed = train(run, resumed_folder)
            names = list(torch.load(checkpoint)["model"])
            final = as_vector(resumed.final, names)
            assert resumed.losses == whole.losses[CHECKPOINT_ITERS:]
            assert np.array_equal(final, as_vector(whole.final, names))

            recorded[f"{run}_losses"] = np.array(resumed.losses)
            recorded[f"{run}_final"] = final
            result = outputs(run, temporary / "outputs", str(checkpoint))
            recorded[f"{run}_outputs"] = result.numpy()
    np.savez_compressed(folder / "recorded.npz", **recorded)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
