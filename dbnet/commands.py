"""What `pip install` puts on the path: dbnet-train, dbnet-evaluate, dbnet-predict and dbnet-export.

Each is the script of that name, with its mistakes answered in one line.
"""

from importlib import import_module

from dbnet.errors import run_script


def train() -> None:
    run_script(lambda: import_module("train").main())


def evaluate() -> None:
    run_script(lambda: import_module("evaluate").main())


def predict() -> None:
    run_script(lambda: import_module("predict").main())


def export() -> None:
    run_script(lambda: import_module("export").main())
