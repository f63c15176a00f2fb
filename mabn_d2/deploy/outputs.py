"""
Where drawn images go: files, a video, a window. What is left behind is complete.

Each is a context manager with `write(name, picture)`, the `name` of the place, and the `count` of what is there.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import cv2
import numpy as np

from ..utils.files import atomic_write
from .inputs import IMAGES

CODECS = {".mp4": "mp4v", ".avi": "MJPG"}  # of every OpenCV from PyPI


class PictureFiles:
    """One picture per image: PNG files of the images' names in a folder, or one file."""

    def __init__(self, output: str, names: Sequence[str]):
        """
        Args:
            output: the folder, or, for one image, the file if it is named like an image.
            names: of all images.

        Raises:
            FileExistsError: one of the files exists.
            ValueError: two images have the same name, or one file is for several images.
        """
        self.name, self.count = output, 0
        if output.lower().endswith(IMAGES):
            if len(names) != 1:
                raise ValueError(f"{output} is for one image, and there are {len(names)}")
            self._files = {names[0]: output}
        else:
            stems = (os.path.splitext(os.path.basename(name))[0] for name in names)
            self._files = {n: os.path.join(output, f"{s}.png") for n, s in zip(names, stems)}
        by_file: dict[str, str] = {}
        for name, file in self._files.items():
            if file in by_file:
                raise ValueError(f"{file} would be the picture of {by_file[file]} and of {name}")
            by_file[file] = name
            refuse_existing(file)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def write(self, name: str, picture: np.ndarray) -> bool:
        """
        Args:
            name: of the image.
            picture: shape (H, W, 3), uint8, BGR.

        Returns:
            Whether more is wanted.
        """
        file = self._files[name]
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        _, encoded = cv2.imencode(os.path.splitext(file)[1], picture)
        with atomic_write(file) as f:
            f.write(encoded.tobytes())
        self.count += 1
        return True


class VideoFile:
    """
    A video of the pictures, which is there once it is complete.

    Ctrl-C ends it with the pictures that it has. Any other error leaves nothing, nor does a full disk, which is
    an `OSError`.
    """

    def __init__(self, output: str, frames_per_second: float):
        """
        Raises:
            FileExistsError: the file exists.
            ValueError: its name does not end like one of `CODECS`, or its folder does not exist.
        """
        self.name, self.count = output, 0
        self._kind = os.path.splitext(output)[1].lower()
        if self._kind not in CODECS:
            raise ValueError(f"{output}: a video must be named *{' or *'.join(CODECS)}")
        refuse_existing(output)
        folder = os.path.dirname(output) or "."
        if not os.path.isdir(folder):
            raise ValueError(f"{output}: the folder {folder} does not exist")
        self._folder = folder
        self._frames_per_second = frames_per_second
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self):
        # OpenCV takes the kind of video from the name.
        self._partial = tempfile.TemporaryDirectory(dir=self._folder, prefix=".")
        self._file = os.path.join(self._partial.name, f"video{self._kind}")
        return self

    def write(self, name: str, picture: np.ndarray) -> bool:
        """
        Raises:
            ValueError: OpenCV lacks the codec.
        """
        # Codecs drop the last row and column of odd sizes.
        odd_rows, odd_columns = (n % 2 for n in picture.shape[:2])
        picture = np.pad(picture, ((0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
        if self._writer is None:
            codec = CODECS[self._kind]
            self._writer = cv2.VideoWriter(
                self._file, cv2.VideoWriter.fourcc(*codec), self._frames_per_second,
                (picture.shape[1], picture.shape[0]),
            )  # fmt: skip
            if not self._writer.isOpened():
                raise ValueError(
                    f"{self.name}: OpenCV of this machine cannot write the codec {codec}; "
                    f"the kinds of video are {', '.join(CODECS)}"
                )
        self._writer.write(picture)
        self.count += 1
        return True

    def __exit__(self, kind, error, traceback) -> None:
        with self._partial:
            if self._writer is not None:
                self._writer.release()
            written, self.count = self.count, 0
            if written == 0 or not (kind is None or issubclass(kind, KeyboardInterrupt)):
                return
            on_disk = _number_of_frames(self._file)
            if on_disk < written:  # OpenCV does not tell
                raise OSError(
                    f"{self.name}: only {on_disk} of {written} frames could be written, is the disk full?"
                )
            os.replace(self._file, self.name)
            self.count = written


def _number_of_frames(video: str) -> int:
    """Frames that can be read from a file."""
    capture, count = cv2.VideoCapture(video), 0
    while capture.grab():
        count += 1
    capture.release()
    return count


class Window:
    """A window on the screen; `q`, Escape or closing it ends, any other key shows the next image."""

    def __init__(self, title: str, wait: bool):
        """
        Args:
            wait: whether an image stays until a key is pressed.

        Raises:
            ValueError: there is no display.
        """
        # Without a display Qt aborts the process that asks.
        probe = "import cv2; cv2.namedWindow('mabn_d2')"
        if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
            raise ValueError(
                "--window: OpenCV cannot open a window, there is no display or it is built without"
            )
        self._title, self._wait = title, wait
        self.name, self.count = "the window", 0

    def __enter__(self):
        cv2.namedWindow(self._title, cv2.WINDOW_NORMAL)
        return self

    def write(self, name: str, picture: np.ndarray) -> bool:
        cv2.imshow(self._title, picture)
        self.count += 1
        while True:
            key = cv2.waitKey(50 if self._wait else 1)  # often, so that Ctrl-C is seen
            closed = cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1
            if closed or key in (ord("q"), 27):
                return False
            if key != -1 or not self._wait:
                return True

    def __exit__(self, *error) -> None:
        cv2.destroyAllWindows()


def refuse_existing(path: str) -> None:
    """
    Raises:
        FileExistsError: there is something at `path`.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists")
