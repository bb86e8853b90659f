"""Decoded images, kept from epoch to epoch: what augmentation does not change is computed once."""

import os
import sys
import tempfile

import numpy as np

from dbnet.config import DataConfig

_HEADER = np.dtype([("key", "i8", 3), ("shape", "i8", 2), ("size", "i8", 2)])


class PixelCache:
    """A slot of disk for the pixels of each image, in one temporary file that all workers read and write.

    The file has no name, so it goes with the last process that holds it, however that ends; it lives in the system's
    temporary folder (TMPDIR) and takes at most half of the room there. What is used often stays in the
    system's page cache, which other needs of memory displace; no process maps it. Images beyond the room are not kept.
    """

    def __init__(self, images: int, side: int, config: DataConfig) -> None:
        """`images` slots for (height, width, 3) uint8 pixels of at most side x side, within config.cache_gb."""
        self._slot_bytes = _HEADER.itemsize + 3 * side**2
        self._file, self._slots = None, 0
        try:
            with tempfile.TemporaryFile(buffering=0) as file:
                free = os.fstatvfs(file.fileno()).f_bavail * os.fstatvfs(file.fileno()).f_frsize
                self._file = os.dup(file.fileno())
        except OSError:
            return
        self._slots = min(images, int(min(config.cache_gb * 1e9, free / 2)) // self._slot_bytes)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def __getstate__(self) -> dict[str, int | None]:
        """A process that is spawned, not forked, has no part in the file and caches nothing."""
        return {"_file": None, "_slots": 0, "_slot_bytes": self._slot_bytes}

    def load(self, index: int, key: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int]] | None:
        """The pixels and the (width, height) stored for an image under this key, or None."""
        if self._file is None or index >= self._slots:
            return None
        header = np.empty(1, _HEADER)
        start = index * self._slot_bytes
        if os.preadv(self._file, [header.data], start) < _HEADER.itemsize or tuple(header["key"][0]) != key:
            return None
        pixels = np.empty((*header["shape"][0], 3), np.uint8)
        if os.preadv(self._file, [pixels.data], start + _HEADER.itemsize) < pixels.size:
            return None
        return pixels, tuple(header["size"][0].tolist())

    def store(self, index: int, key: tuple[int, int, int], pixels: np.ndarray, size: tuple[int, int]) -> None:
        """Keep `pixels` for the key, which stands for all that they are made from, and the image's (width, height).

        A full disk ends the caching of this process, and is said.
        """
        if self._file is None or index >= self._slots:
            return
        start = index * self._slot_bytes
        header = np.array([(key, pixels.shape[:2], size)], _HEADER)
        try:
            if os.pwritev(self._file, [pixels.data], start + _HEADER.itemsize) == pixels.size:
                os.pwritev(self._file, [header.data], start)  # last, so that a slot half written does not count
        except OSError as error:
            self._slots = 0
            print(f"\nimages are no longer cached ({error.strerror} in {tempfile.gettempdir()})", file=sys.stderr)
