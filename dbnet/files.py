"""Files that appear whole or not at all, and checks of inputs and outputs before the work begins."""

import glob
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from dbnet.errors import UserError, library_errors

_MARKED_BYTES = 1 << 16
_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFBLK: "disk", stat.S_IFCHR: "device"}


@contextmanager
def write_whole(path: Path, mode: str = "wb", keep: Path | None = None) -> Iterator[IO]:
    """Open a temporary file beside `path` that replaces it when the block succeeds and is removed when it fails. It is
    synced to the disk first: a killed process or a power failure leaves the old file, here or at `keep`, a place beside
    it, or the new one. What a symbolic link points to is replaced, not the link; a character device or a pipe under
    /dev is written directly. Text is UTF-8 with the newlines as written. Raises UserError where it fails."""
    how: Any = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with library_errors(f"{path}: cannot be written", "name another place or make room", of=OSError):
        if _is_written_through(path):
            with path.open(mode, **how) as file:
                yield file
            return
        path = Path(os.path.realpath(path))
        temporary = _beside(path)
        try:
            with temporary.open(mode, **how) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                path.replace(keep)
            temporary.replace(path)
        finally:
            with suppress(OSError):  # a file system that has become read-only keeps it
                temporary.unlink(missing_ok=True)
        with suppress(OSError):  # brings the names to the disk; not all systems open folders
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock on the file `path`. At the end of the block the file is removed, and its folder if that is empty. The
    lock of a process that has died does not count. Raises UserError, beginning with `message`, where another process
    holds it. Without locks in the system or the file system, the block runs without one."""
    make_folder(path.parent)
    check_regular(path)
    check_writable(path)
    with library_errors(f"{path}: cannot be opened", "remove it", of=OSError):
        file = path.open("a+")
    with file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers have no part in it
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        except (BlockingIOError, PermissionError):  # systems differ
            file.seek(0)
            process = file.read().strip() or "of another machine"
            raise UserError(f"{message} by process {process}; wait for its end, or stop it") from None
        except (OSError, ImportError):
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # not that of a folder made anew
                    path.unlink()
                path.parent.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed `write_whole` has left in a folder that nobody else writes to."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


Row = dict[str, Any]  # a line of log.jsonl: the numbers of an epoch, by name


def read_log(path: Path) -> list[Row]:
    """The rows of a log.jsonl in the order of epochs, the last one of each; broken lines are left out."""
    check_regular(path)
    rows: dict[int, Row] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            row = json.loads(line)
            rows[int(row["epoch"])] = row | {"epoch": int(row["epoch"])}
    return [rows[epoch] for epoch in sorted(rows)]


def write_json(path: Path, content: Any) -> None:
    """Write plain values as indented JSON, whole or not at all."""
    with write_whole(path, "w") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_outputs(*outputs: tuple[Path | None, str], inputs: Iterable[Path] = ()) -> None:
    """Raise UserError unless each result can be written, overwrites nothing but an earlier result, and is not one of
    `inputs`, another output or the file that the command prints into. An output is a path, or None, and a mark: words
    near the beginning or end of every result of its kind, or the first line of every table, with its line end."""
    taken = {_identity(path): "is an input of this command; name another file for the result" for path in inputs}
    for stream in (1, 2):
        printed = _stat(stream)
        if printed and not stat.S_ISCHR(printed.st_mode):
            taken[_identity(stream)] = "what the command prints would be mixed into it; name a file"
    folders: set[Path] = set()
    for path, mark in outputs:
        if not path:
            continue
        identity, there = _identity(check_name(path)), _stat(path)
        if identity in taken:
            raise UserError(f"{path}: {taken[identity]}")
        if there and stat.S_ISREG(there.st_mode) and there.st_size and not _has_mark(path, mark):
            raise UserError(f"{path}: exists, and is not an earlier result of this kind; name another or remove it")
        if not _is_written_through(path):
            taken[identity] = "is named for two results; name another file for one of them"
            if there or path.parent not in folders:
                check_writable(path)
                folders.add(path.parent)


def check_name(path: Path) -> Path:
    """The path. Raises UserError for a name of more than the 255 bytes that file systems take."""
    if len(os.fsencode(path.name)) > 255:
        raise UserError(f"{path}: the name is too long for a file; shorten it")
    return path


def check_regular(path: Path, error: type[UserError] = UserError) -> None:
    """Raise `error` for a pipe, a device or a socket: reading it may never end. A path without a file passes."""
    if kind := _special_kind(path):
        raise error(f"{path}: is a {kind}, not a file; save its content to a file and name that")


def _is_written_through(path: Path) -> bool:
    """Whether a path is a character device, or a pipe that the shell has opened, such as `>(gzip)`. Raises UserError
    for other special files: writing into a named pipe might never end, into a disk destroys it."""
    kind = _special_kind(path)
    of_shell = path.parts[:2] in (("/", "dev"), ("/", "proc"))
    if kind and kind != "device" and not (kind == "pipe" and of_shell):
        raise UserError(f"{path}: is a {kind}; name a file")
    return kind is not None


def _special_kind(path: Path) -> str | None:
    """What a path is that is neither a file nor a folder."""
    there = _stat(path)
    return _KINDS.get(stat.S_IFMT(there.st_mode)) if there else None


def _stat(path: Path | int) -> os.stat_result | None:
    with suppress(OSError, ValueError):  # no path at all
        return os.stat(path)
    return None


def _identity(path: Path | int) -> object:
    """The same for all names of a file."""
    there = _stat(path)
    return (there.st_dev, there.st_ino) if there else os.path.realpath(str(path))


def _has_mark(path: Path, mark: str) -> bool:
    """Whether the first or the last 64 KiB of a file have these words; of a table, whether its first line has them."""
    with suppress(OSError), path.open("rb") as file:
        first = file.read(_MARKED_BYTES)
        if mark.endswith("\r\n"):
            return first.startswith(mark.encode())
        file.seek(max(0, os.fstat(file.fileno()).st_size - _MARKED_BYTES))
        return mark.encode() in first + file.read()
    return False


def check_writable(path: Path) -> None:
    """Raise UserError unless a file can be written at `path`."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file, or remove it")
    probe = _beside(Path(os.path.realpath(path)))
    with library_errors(f"{path}: cannot be written", "name another place", of=OSError):
        probe.touch()
        probe.unlink()


def _beside(path: Path) -> Path:
    """A hidden name of this process's own beside `path`."""
    return path.with_name(f".{cut_name(path)}.{os.getpid()}.tmp")


def cut_name(path: Path) -> str:
    """As much of a file's name as leaves room for an addition in the 255 bytes that file systems take."""
    return path.name.encode(errors="ignore")[:200].decode(errors="ignore")


def make_folder(folder: Path) -> None:
    """Create a folder where there is none. Raises UserError where files cannot be written in it."""
    with library_errors(f"{folder}: cannot be written", "name another folder", of=OSError):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder / "probe")


def stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns, which change with a file's content; None without a file."""
    there = _stat(path)
    return (there.st_size, there.st_mtime_ns) if there else None


class Journal:
    """Results so far of a long job, a line of JSON an item, in OUT.rankN.partial beside its output; beside a device or
    a pipe nothing is kept. `done` holds those of an earlier job by key."""

    def __init__(self, out: Path, rank: int, made_by: Any, resume: bool) -> None:
        """`made_by` are plain values that results depend on; without `resume`, earlier results are dropped."""
        out = Path(os.path.abspath(out))  # a folder of label files may be called .
        self._made_by, self._is_kept = made_by, out.is_dir() or not _is_written_through(out)
        self._path = out.with_name(f"{cut_name(out)}.rank{rank}.partial")
        self._all = f"{glob.escape(cut_name(out))}.rank[0-9]*.partial"
        self.done: dict[str, Any] = {}
        if self._is_kept:
            check_writable(self._path)
        if not resume:
            self._path.unlink(missing_ok=True)
        for path in sorted(out.parent.glob(self._all)) if resume else ():
            check_regular(path)
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError, RecursionError):
                    key, result = json.loads(line)
                    self.done[key] = result

    def key(self, item: Path, source: Path) -> str:
        """A key that changes with the item, the file `source` that it is in, and all that results depend on."""
        there = _stat(source)
        renamed = there and there.st_ctime_ns  # images that have changed places can be of one size and one time
        return sha256(json.dumps([str(item), stamp(source), renamed, self._made_by]).encode()).hexdigest()

    def add(self, key: str, result: Any) -> None:
        """Keep a result of plain values; from here on it outlives the process."""
        if not self._is_kept:
            return
        told = library_errors(f"{self._path}: cannot be written", "make room, then --resume", of=OSError)
        with told, self._path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps([key, result])}")  # the newline ends a line that was cut short

    def remove(self) -> None:
        """Remove the results of all processes, when the output is whole."""
        for path in self._path.parent.glob(self._all):
            path.unlink(missing_ok=True)
