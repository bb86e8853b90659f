"""What a long prediction has found so far, kept beside its output: with it, a prediction that was cut short goes on."""

import glob
import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dbnet import distributed
from dbnet.annotations import Annotation
from dbnet.errors import UserError
from dbnet.files import cut_name

Found = tuple[Annotation, str | None]
"""What was found in an image, and a line where it could not be read"""


class Partial:
    """Results for the file `out`, a line of JSON an image, in OUT.rankN.partial for each process.

    `done` holds those of an earlier prediction, of all processes, by name of the image; a line that was cut short does
    not count. When the block ends well, and the output is whole, they go.
    """

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool) -> None:
        """Every rank calls it. `settings`: plain values that the results depend on.

        Raises UserError where the file cannot be written, or was made with other settings.
        """
        self._out = out
        self.path = out.with_name(f"{cut_name(out)}.rank{distributed.rank()}.partial")
        self._settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        earlier = self._files()
        found = [self._read(path) for path in earlier] if resume else []
        self.done: dict[str, Found] = {}
        for ours in distributed.all_gather(found):  # and nobody writes before everybody has read
            for results in ours:
                self.done |= results
        if not resume:
            for path in earlier:
                path.unlink(missing_ok=True)
            distributed.all_gather(None)
        try:
            self._file = self.path.open("a", encoding="utf-8")
            self._write("")  # ends a line that was cut short
            self._write(json.dumps({"settings": self._settings}))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); name another place") from None

    def add(self, name: str, found: Annotation, error: str | None) -> None:
        """Keep what was found in an image; from here on it outlives the process."""
        polygons = [polygon.tolist() for polygon in found.polygons]
        row = {"name": name, "polygons": polygons, "scores": found.scores, "size": found.size, "error": error}
        try:
            self._write(json.dumps(row))
            self.done[name] = found, error
        except OSError as failure:
            raise UserError(f"{self.path}: cannot be written ({failure.strerror}); make room, then --resume") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()
        if kind is None and distributed.is_first():
            for path in self._files():
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Those of all processes on this machine."""
        return sorted(self._out.parent.glob(f"{glob.escape(cut_name(self._out))}.rank*.partial"))

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def _read(self, path: Path) -> dict[str, Found]:
        """The results in a file."""
        results: dict[str, Found] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("settings", self._settings) != self._settings:
                raise UserError(f"{path}: was made with another checkpoint or other settings; leave out --resume")
            if "name" in row:
                polygons = [np.array(polygon, int) for polygon in row["polygons"]]
                size = tuple(row["size"]) if row["size"] else None
                found = Annotation(polygons, [False] * len(polygons), row["scores"], size)
                results[row["name"]] = found, row["error"]
        return results
