"""Errors that a user can fix, told in one line; how a script runs, and how the next one is typed."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """A user's mistake. The message is one line, names the file or flag, and says what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text`, often a file's name, with what would break a line, drive a terminal or is no character escaped."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class ImageError(UserError):
    """An image that cannot be used; the message is one line that names the file and the reason."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and exit: 0 on success, 2 with one line on stderr for a `UserError`, 130 on Ctrl-C.

    Anything else is a fault of the program and keeps its traceback (exit status 1).
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def typed(script: str, processes: int = 1) -> str:
    """The words that start `script` ("train", "predict", ...), in the form in which the running script was started.

    That is `python predict.py`, `dbnet-predict` or `python -m dbnet.scripts.predict`; with several processes, torchrun.
    """
    program = Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    command = program.name.startswith("dbnet-")
    if command or (module and module.name.startswith("dbnet.scripts.")):
        option, name = "-m ", f"dbnet.scripts.{script}"
    else:
        option, name = "", shlex.quote(str(program.with_name(f"{script}.py")))
    if processes > 1:
        return f"torchrun --nproc-per-node {processes} {option}-- {name}"
    return f"dbnet-{script}" if command else f"python {option}{name}"
