"""The house: how many files and lines, how long a function may be, and that imports run one way."""

import ast
from collections import Counter

from benchmarks.size import ROOT, count_files, count_lines, functions, imports, sources

ROOMS = (
    *("errors", "files", "config", "device"),
    *("images", "geometry", "annotations", "formats", "splits", "augment", "targets", "dataset"),
    *("backbone", "model", "loss"),
    *("memory", "checkpoint", "training"),
    *("postprocess", "ensemble", "inference"),
    *("metric", "evaluation", "pictures", "tuning", "report"),
    *("synth", "dbnet"),
    *("train", "evaluate", "predict", "export"),
)
"""Rooms from the ground up: each imports from the ones before it, and nothing else of ours."""


def test_there_are_at_most_33_files():
    assert count_files() <= 33


def test_there_are_at_most_9000_lines():
    assert sum(map(count_lines, sources())) <= 9000


def test_train_has_at_most_260_lines():
    assert count_lines(ROOT / "train.py") <= 260


def test_no_function_is_longer_than_60_lines_or_has_more_than_15_branches():
    assert [function for function in functions() if function.lines > 60 or function.branches > 15] == []


def test_imports_run_one_way():
    arrows = {(importer, imported) for importer, imported in imports() if importer != imported}
    strangers = {name for arrow in arrows for name in arrow} - set(ROOMS)
    upward = {arrow for arrow in arrows if not strangers & set(arrow) and ROOMS.index(arrow[0]) < ROOMS.index(arrow[1])}
    assert (sorted(strangers), sorted(upward)) == ([], [])


def test_no_script_is_imported_by_its_name_as_text():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in sources():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("import_module", "__import__")):
                assert not {node.value for node in ast.walk(call) if isinstance(node, ast.Constant)} & scripts


def test_every_module_is_used_and_says_what_it_is_for():
    used = Counter(imported for importer, imported in imports() if importer != imported)
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), path
        assert path.parent.name != "dbnet" or used[path.stem] or path.stem == "__init__", path


# ---- code from files


FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}


def code_that_can_run_input(source):
    """What in a module could run code from a file: lines and why."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            found += [(node.lineno, module) for module in modules if module.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            safe_load = name != "torch.load" or given.get("weights_only") == "True"
            plain = given.get("shell", "False") == "False" and given.get("allow_pickle", "False") == "False"
            if name in FORBIDDEN_CALLS or not safe_load or not plain:
                found.append((node.lineno, name))
    return found


def test_nothing_in_the_package_can_run_code_from_a_file():
    files = [*ROOT.glob("*.py"), *(ROOT / "dbnet").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert len(files) > 20
    assert {path.name: found for path in files if (found := code_that_can_run_input(path.read_text()))} == {}
    for source in ("import pickle", "eval('1')", "torch.load(a)", "run(a, shell=True)", "from dill import load"):
        assert code_that_can_run_input(source)
    assert not code_that_can_run_input("model.eval()\ntorch.load(a, weights_only=True)\nmodel.compile()")
