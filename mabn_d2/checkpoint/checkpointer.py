"""Checkpoints that are whole or not there."""

import logging
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..layers import MABN2d
from ..utils.files import atomic_write

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """
    A `DetectionCheckpointer` that writes to local disk such that a job killed at any moment leaves
    the last complete checkpoint, and a `last_checkpoint` that names it.
    """

    def load(self, path, *args, **kwargs):
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        missing = set(incompatible.missing_keys)
        names = [name for name, m in self.model.named_modules() if isinstance(m, MABN2d)]
        # Weights without MABN's statistics are another norm's; without any, they are of other layers.
        foreign = [
            name for name in names
            if f"{name}.psi.count" in missing and f"{name}.weight" not in missing
        ]  # fmt: skip
        if foreign:
            logger.warning(
                "%s holds weights of another norm, such as BN, for %d of %d MABN layers (%s, ...). "
                "MABN needs weights that were trained with MABN and centralized kernels: with others "
                "expect to lose about half of the AP. tools/convert_weights.py converts MABN weights of "
                "other code; without such weights train from scratch.",
                self._path, len(foreign), len(names), foreign[0],
            )  # fmt: skip
        return incompatible

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        if getattr(self.model, "matching_heuristics", False):
            data["matching_heuristics"] = True  # names may be matched by their ends
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        self._remove_partial_files()
        with atomic_write(path) as f:
            torch.save(data, f)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint"), "w") as f:
            f.write(last_filename_basename)

    def _remove_partial_files(self) -> None:
        """What a job that was killed while it saved has left."""
        for name in os.listdir(self.save_dir):
            if name.startswith(".model_") or name.startswith(".last_checkpoint."):
                os.remove(os.path.join(self.save_dir, name))
