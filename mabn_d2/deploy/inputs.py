"""Images, folders, patterns of names, videos and cameras, as images with a name."""

import glob
import os
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image

# What OpenCV's libraries print themselves is not one line; they read it when they are first used.
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class ImageFiles:
    """
    Images of files, with the file's path as their name.

    An image has shape (H, W, 3), uint8, in the order BGR, turned as its EXIF says.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """
        Raises:
            ValueError: a file cannot be read as an image.
        """
        for path in self.paths:
            try:
                image = read_image(path, "BGR")
            except Exception as error:  # Pillow's are of many types
                raise ValueError(f"{path} cannot be read as an image: {error}") from error
            yield path, image


class Video:
    """The frames of a video or of a camera, of the same kind as :class:`ImageFiles`."""

    def __init__(self, source: str | int):
        """
        Args:
            source: path of a video, or the number of a camera.

        Raises:
            ValueError: it cannot be opened.
        """
        self._name = f"camera {source}" if isinstance(source, int) else source
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            kinds = "" if isinstance(source, int) else f" as a video; images are named {_kinds()}"
            raise ValueError(f"{self._name} cannot be opened{kinds}")
        self.frames_per_second = self._capture.get(cv2.CAP_PROP_FPS) or 25.0

    def __len__(self) -> int:
        """As the file states it; 0 if it does not."""
        return max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """
        Raises:
            ValueError: there is no frame.
        """
        number = 0
        while True:
            found, frame = self._capture.read()
            if not found:
                break
            yield f"{self._name}, frame {number}", frame
            number += 1
        if number == 0:
            raise ValueError(f"{self._name} gives no frame")


def open_inputs(names: Sequence[str]) -> ImageFiles | Video:
    """
    Args:
        names: images, folders, patterns like `photos/*.jpg`; or one video. Of a folder or a pattern,
            the images are taken in the order of their names.

    Raises:
        FileNotFoundError: there is no such file, or no image in a folder or of a pattern.
        ValueError: a file is neither an image nor a video, or a video is one of several inputs.
    """
    paths: list[str] = []
    for name in names:
        if os.path.isfile(name):
            if name.lower().endswith(IMAGES):
                paths.append(name)
            elif len(names) == 1:
                return Video(name)
            else:
                raise ValueError(f"{name} is not named {_kinds()}; a video is the only input")
            continue
        pattern = os.path.join(glob.escape(name), "*") if os.path.isdir(name) else name
        found = [p for p in sorted(glob.glob(pattern)) if p.lower().endswith(IMAGES)]
        if not found:
            where = f"there is no image ({_kinds()}) in" if os.path.isdir(name) else "there is no"
            raise FileNotFoundError(f"{where} {name}")
        paths += found
    return ImageFiles(paths)


def _kinds() -> str:
    return ", ".join(f"*{kind}" for kind in IMAGES)
