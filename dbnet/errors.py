"""Errors that a user can fix, told in one line; how a script runs and prints, and how the next one is typed."""

import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

ABANDONED = "abandoned"  # name of a thread that cannot be stopped
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_OUT_OF_MEMORY = re.compile(
    "out ?of ?memory|can(no|')t allocate memory|(insufficient|not enough) memory|alloc_failed|allocation_failed"
    "|failed to allocate|failed to map segment|bad_alloc"
    "|(cudnn|cublas)_status_not_initialized"  # their handles could not be made
    "|unable to find an engine|unable to find a valid cudnn algorithm"  # what cuDNN tried had no room to work in
    "|could not create a primitive(?! descriptor)"  # oneDNN
    "|failed to cuda (calloc|malloc|host alloc)"  # NCCL
)


class UserError(Exception):
    """A user's mistake. The message is one line that names the file or flag and how to fix it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ImageError(UserError):
    """An image that cannot be used; the message is one line that names the file and the reason."""


def printable(text: str, keep: str = "") -> str:
    """Escape what breaks a line, controls a terminal or is no character in text from files, except `keep`."""
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


def one_line(error: BaseException) -> str:
    """The reason that an exception of a library or the system gives, in at most 200 characters; else its class."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(reason.split())[:200] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's by its class, a library's by its words."""
    words = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(words))


@contextmanager
def library_errors(
    message: str, fix: str = "", kind: type[UserError] = UserError, of: type[Exception] = Exception
) -> Iterator[None]:
    """Turn errors `of` a library or the system into `kind`: the message, the reason in brackets, and the fix. UserError
    passes; a lack of memory becomes MemoryError, because it says nothing about the input."""
    try:
        yield
    except of as error:
        if isinstance(error, UserError | MemoryError):
            raise
        if is_out_of_memory(error):
            raise MemoryError(one_line(error)) from error
        raise kind(f"{message} ({one_line(error)})" + (f"; {fix}" if fix else "")) from None


class _Screen:
    """A standard stream that drops what is printed after its first error, so that the work goes on. Characters that
    its encoding lacks are escaped, and control characters except those in `keep`."""

    def __init__(self, stream: TextIO | None, keep: str) -> None:
        self.stream: Any = stream or open(os.devnull, "w")  # noqa: SIM115 (None: closed from the start)
        self.keep = keep
        self.failure: OSError | None = None
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, printable(text, self.keep))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.failure = self.failure or error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # where the buffer's rest goes


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main` within `one_line_errors`. A screen that cannot be written does not stop the work; at the
    end the exit status is 2, unless the reader of a pipe has closed it."""
    screen: Any = _Screen(sys.stdout, keep="\n\t")
    errors: Any = _Screen(sys.stderr, keep="\n\t\r")  # progress bars begin their line again
    status: Any = 0
    with redirect_stdout(screen), redirect_stderr(errors):
        try:
            with one_line_errors():
                main()
        except SystemExit as end:
            status = end.code
        finally:
            screen.flush()
            errors.flush()
    if not status and screen.failure and not isinstance(screen.failure, BrokenPipeError):
        print(f"error: stdout: cannot be written ({screen.failure.strerror})", file=sys.stderr)
        status = 2
    if any(thread.name == ABANDONED for thread in threading.enumerate()):
        os._exit(status or 0)  # the end of the interpreter would abort the process
    if status:
        sys.exit(status)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with 2 and one line on stderr for a `UserError`, a missing library or a lack of memory, 130 on Ctrl-C. Other
    exceptions are faults of the program and keep their traceback (exit status 1)."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        reason = printable(one_line(error))
        if isinstance(error, UserError):
            reason = str(error)
        elif isinstance(error, ModuleNotFoundError) and error.name in ("torch", "torchvision"):
            reason = "PyTorch is not installed: pip install torch torchvision"
        elif is_out_of_memory(error):
            fix = "close other programs, or lower --batch-size, --image-size or --workers"
            reason = f"not enough memory ({reason}); {fix}"
        elif isinstance(error, ImportError) and ".so" in reason:  # OpenCV's wheel on a machine without a screen
            fix = "pip install opencv-python-headless in place of opencv-python, or apt install libgl1 libglib2.0-0"
            reason = f"a library is missing ({reason}); for OpenCV: {fix}"
        elif isinstance(error, OSError) and error.filename is not None:  # a name too long, a folder closed to this user
            reason = f"{printable(os.fsdecode(str(error.filename)))}: cannot be used ({error.strerror})"
        elif isinstance(error, BrokenExecutor):
            reason = "a worker process was killed; if memory is short, lower --workers, or use --workers 0"
        else:
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


def typed(script: str, processes: int = 1) -> str:
    """The words that start `script` ("train", "predict", ...), in the form in which the running script was started:
    `python predict.py`, `dbnet-predict` or `python -m dbnet.scripts.predict`; with several processes, by torchrun."""
    program, main = Path(sys.argv[0]), getattr(sys.modules["__main__"], "__spec__", None)
    command = program.name.startswith("dbnet-")
    option, name = "", shlex.quote(str(program.with_name(f"{script}.py")))
    if command or (main and main.name.startswith("dbnet.scripts.")):
        option, name = "-m ", f"dbnet.scripts.{script}"
    if processes > 1:
        return f"torchrun --nproc-per-node {processes} {option}-- {name}"
    return f"dbnet-{script}" if command else f"python {option}{name}"
