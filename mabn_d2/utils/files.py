"""Files that are whole or not there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import (
    IO,
)


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO]:
    """
    Opens a file for writing that takes the place of `path` once it is completely on disk.

    If the block raises, or the process dies in it, `path` is what it was.
    """
    descriptor, partial = tempfile.mkstemp(
        dir=os.path.dirname(path) or ".", prefix=f".{os.path.basename(path)}."
    )
    try:
        with os.fdopen(descriptor, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
