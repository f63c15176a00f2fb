"""What can be said of the files that a config names before any worker starts."""
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager


def check_dataset(name: str, key: str) -> None:
    """
    Args:
        name: of a data set for detection.
        key: of the config, for the message.

    Raises:
        ValueError: the data set is not registered, or its annotations do not exist.
    """
    if name not in DatasetCatalog.list():
        raise ValueError(f"{key}: no data set is registered as {name!r}")
    file = getattr(MetadataCatalog.get(name), "json_file", None)
    if file and not PathManager.exists(file):
        raise ValueError(
            f"{key}: {name} needs {file}, which does not exist. The environment variable "
            "DETECTRON2_DATASETS names the folder of the data sets, by default ./datasets"
        )


def check_weights(weights: str, key: str) -> None:
    """
    Args:
        weights: path or URL; "" for none.
        key: of the config, for the message.

    Raises:
        ValueError: it is a path of no file.
    """
    weights = weights.split("?")[0]  # Detectron2 takes options behind the name
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise ValueError(f"{key}: {weights} does not exist")
