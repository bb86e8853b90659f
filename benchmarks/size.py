"""The size of the program: files, lines, the longest functions, and the imports between its modules.

    python benchmarks/size.py

tests/test_house.py holds the limits. Lines are all lines of a file; the lines of a function include its docstring and
the functions inside it, whose branches count for themselves.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Function(NamedTuple):
    """A function of the program and its size."""

    name: str
    """file and qualified name, as `dbnet/loss.py: db_loss`"""
    lines: int
    branches: int


def sources() -> list[Path]:
    """The scripts and the modules of the package."""
    return [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "dbnet").rglob("*.py"))]


def count_files() -> int:
    """Number of files; the folder dbnet/synth counts as one."""
    return len({path.parent if path.parent.name == "synth" else path for path in sources()})


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions() -> list[Function]:
    """All functions and methods of the program."""
    found: list[Function] = []

    def visit(node: ast.AST, name: str, separator: str) -> int:
        """Note the functions under `node`, and return the branches of the function that it is part of."""
        branches = 0
        for child in ast.iter_child_nodes(node):
            branches += isinstance(child, BRANCHES)
            if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                inner = visit(child, f"{name}{separator}{child.name}", ".")
                if isinstance(child, FUNCTIONS):
                    lines = (child.end_lineno or 0) - child.lineno + 1
                    found.append(Function(f"{name}{separator}{child.name}", lines, inner))
            else:
                branches += visit(child, name, separator)
        return branches

    for path in sources():
        visit(ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT)), ": ")
    return found


def room(module: str) -> str:
    """The room of a module: `loss` for dbnet.loss, `synth` for dbnet.synth.scene, `dbnet` for the package itself."""
    return module.split(".")[1] if "." in module else module


def imports() -> Iterator[tuple[str, str]]:
    """(importing room, imported room) of each import of our own modules, those inside functions included."""
    own = {path.stem for path in ROOT.glob("*.py")} | {"dbnet"}
    for path in sources():
        parts = path.relative_to(ROOT).with_suffix("").parts
        importer = room(".".join(parts).removesuffix(".__init__"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "dbnet":
                names = [f"dbnet.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            yield from ((importer, room(name)) for name in names if name.split(".")[0] in own)


def main() -> None:
    lines = {path: count_lines(path) for path in sources()}
    print(f"{count_files()} files, {sum(lines.values())} lines, train.py {lines[ROOT / 'train.py']} lines")
    print(f"\n{'lines':>5}  file")
    for path, count in sorted(lines.items(), key=lambda item: -item[1]):
        print(f"{count:5}  {path.relative_to(ROOT)}")
    print(f"\n{'lines':>5}  {'branches':>8}  the longest functions")
    for function in sorted(functions(), key=lambda function: (-function.lines, -function.branches))[:20]:
        print(f"{function.lines:5}  {function.branches:8}  {function.name}")


if __name__ == "__main__":
    main()
