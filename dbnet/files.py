"""Files that appear whole or not at all, and folders that are known to be writable before the work begins."""

import glob
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from dbnet.errors import UserError


def check_regular(path: Path, error: type[UserError] = UserError) -> None:
    """Raise `error` for a pipe, a device or a socket: reading it may never end.

    Passes a path that does not exist or cannot be looked at: opening it gives the system's own reason.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise error(f"{path}: is a {kind}, not a file; save its content to a file and name that")


@contextmanager
def write_whole(path: Path, mode: str = "wb", keep: Path | None = None) -> Iterator[IO]:
    """Open a temporary file beside `path` that takes its place when the block ends well and goes when it does not.

    By then it is on the disk: a process that is killed or a machine that loses power leaves the file that was there, or
    the new one. `keep` names a place beside it for the one that was there. Text is UTF-8 with the newlines as written.
    Raises UserError, with the file that was there kept, where it cannot be written.
    """
    temporary = _beside(path)
    try:
        encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
        with temporary.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            _replace_by_link(path, keep)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another place or make room") from None
    finally:
        with suppress(OSError):  # a file system that has become read-only keeps it
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed in `write_whole` have left in a folder that nobody else writes to."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write plain values as indented JSON, whole or not at all."""
    with write_whole(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def _replace_by_link(path: Path, link: Path) -> None:
    """Make `link` a second name of the file at `path`, which thus is there at any time."""
    temporary = _beside(link)
    try:
        os.link(path, temporary)
        temporary.replace(link)
    except OSError:  # a file system without hard links: for an instant only `link` is there
        path.replace(link)
    finally:  # where `link` is this file already, since a kill before the last step, renaming leaves both names
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system lets a folder be opened."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def check_writable(path: Path) -> None:
    """Raise UserError unless a file can be written at `path`; for before the work that would be lost."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    probe = _beside(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another place") from None


def _beside(path: Path) -> Path:
    """A hidden name of this process's own beside `path`."""
    return path.with_name(f".{cut_name(path)}.{os.getpid()}.tmp")


def cut_name(path: Path) -> str:
    """As much of a file's name as leaves room for an addition in the 255 bytes that file systems take."""
    return path.name.encode(errors="ignore")[:200].decode(errors="ignore")


def make_folder(folder: Path) -> None:
    """Create a folder where there is none. Raises UserError where files cannot be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror}); name another folder") from None
    check_writable(folder / "probe")


def stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns: what changes with a file's content. None without a file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None


class Journal:
    """Results so far of a long job, a line of JSON an item, in OUT.rankN.partial beside its output.

    `done` holds those of an earlier job by their key, which stands for an item, the file that it was made from, and all
    that its result depends on; so a result no longer counts where one of them has changed. A line that was cut short
    does not count either.
    """

    def __init__(self, out: Path, rank: int, made_by: Any, resume: bool) -> None:
        """`made_by`: plain values that results depend on; `resume`: whether earlier ones are read or dropped."""
        self._out, self._made_by = out, made_by
        self._path = out.with_name(f"{cut_name(out)}.rank{rank}.partial")
        self.done: dict[str, Any] = {}
        if not resume:
            self._path.unlink(missing_ok=True)
            return
        for path in self._files():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError):
                    key, result = json.loads(line)
                    self.done[key] = result

    def key(self, item: Path, source: Path) -> str:
        """The key of an item that is read from the file `source`, as both are now."""
        return sha256(json.dumps([str(item), stamp(source), self._made_by]).encode()).hexdigest()

    def add(self, key: str, result: Any) -> None:
        """Keep a result of plain values; from here on it outlives the process."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps([key, result])}")  # the newline ends a line that was cut short
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror}); make room, then --resume") from None

    def remove(self) -> None:
        """Remove the results of all processes, when the output is whole."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._out.parent.glob(f"{glob.escape(cut_name(self._out))}.rank*.partial"))
