"""Errors in one line, what is printed, and that no screen ends the work or hides a missing result."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from support import ROOT

from dbnet.errors import ImageError, UserError, library_errors, one_line, printable


def run(body, redirect="", **environment):
    """Run the body of a main function through run_script, with the shell's redirections."""
    program = f"from dbnet.errors import UserError, run_script\ndef main():\n    {body}\nrun_script(main)\n"
    shell = f'"$0" -c "$1" {redirect}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell, sys.executable, program],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_a_users_mistake_is_one_line_and_status_2():
    result = run("raise UserError('a.jpg\\x1b[31m\\nb: is red; paint it')")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: a.jpg\\x1b[31m\\nb: is red; paint it\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    result = run("print('before'); 1 / 0")
    assert result.returncode == 1 and result.stdout == "before\n"
    assert result.stderr.startswith("Traceback") and "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    "error", ["MemoryError()", "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried 8 bytes')"]
)
def test_a_lack_of_memory_is_one_line(error):
    result = run(f"raise {error}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: not enough memory (")


@pytest.mark.parametrize("status", [0, 3, 130])
def test_the_status_that_a_script_asks_for_is_its_own(status):
    assert run(f"import sys; sys.exit({status})").returncode == status


def test_a_reader_that_has_gone_does_not_end_the_work(tmp_path):
    work = f"[print('x' * 1000) for _ in range(1000)]; open({str(tmp_path / 'done')!r}, 'w')"
    result = run(work, "| head -1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "x" * 1000 + "\n", "")
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("count", [1, 1000])
def test_a_screen_on_a_full_disk_does_not_end_the_work_and_is_no_success(tmp_path, count):
    result = run(f"[print('x' * 1000) for _ in range({count})]; open({str(tmp_path / 'done')!r}, 'w')", "> /dev/full")
    assert (tmp_path / "done").exists() and result.returncode == 2
    assert result.stderr == "error: stdout: cannot be written (No space left on device)\n"


@pytest.mark.parametrize("redirect", ["2> /dev/full", ">&-", "2>&-", ">&- 2>&-", "> /dev/full 2>&1"])
def test_work_is_done_without_any_screen(tmp_path, redirect):
    run(
        "import sys; from tqdm import tqdm; print('out'); print('err', file=sys.stderr)\n"
        f"    for _ in tqdm(range(3)): pass\n    open({str(tmp_path / 'done')!r}, 'w')",
        redirect,
    )
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_loses_a_line(encoding):
    result = run("print('영수증.jpg', '\\ud800')", PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert result.stdout in ("\\uc601\\uc218\\uc99d.jpg \\ud800\n", "영수증.jpg \\ud800\n")


def test_nothing_that_is_printed_controls_the_terminal():
    result = run("print('a\\x1b[2Jb\\x9b31m\\rc\\u202ed\\td', end='\\n')")
    assert result.stdout == "a\\x1b[2Jb\\x9b31m\\rc\\u202ed\td\n"
    result = run("import sys; print('a\\x1b[2Jb', 'c\\u202ed', file=sys.stderr)")
    assert result.stderr == "a\\x1b[2Jb c\\u202ed\n"


def test_printable_leaves_text_of_any_script_alone():
    assert printable("영수증 – 領収書 – قبض é.jpg") == "영수증 – 領収書 – قبض é.jpg"
    assert printable("a\nb\t\x00\x85") == "a\\nb\\t\\x00\\x85"


def test_the_reason_of_a_library_is_one_line_that_is_never_empty():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 200


def test_what_a_library_raises_on_bad_input_is_named():
    told = pytest.raises(ImageError, match=r"^a\.jpg: broken \(no pixels\); save it anew$")
    with told, library_errors("a.jpg: broken", "save it anew", kind=ImageError):
        raise ValueError("no\npixels")
    with pytest.raises(UserError, match=r"^inner$"), library_errors("outer"):
        raise UserError("inner")


def test_a_lack_of_memory_says_nothing_about_the_input():
    with pytest.raises(MemoryError), library_errors("a.jpg: broken"):
        np.empty(1 << 50)
    with pytest.raises(MemoryError), library_errors("a.jpg: broken"):
        raise cv2.error("OpenCV(4.9) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes")
    with pytest.raises(KeyboardInterrupt), library_errors("a.jpg: broken"):
        raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
def test_an_image_that_memory_does_not_hold_is_not_called_broken(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.full((3000, 9000, 3), 200, np.uint8)).save(path)
    program = (
        "import resource, sys; from pathlib import Path; from dbnet.images import read_image\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "limit = pages * resource.getpagesize() + 40_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n    read_image(Path(sys.argv[1]))\nexcept MemoryError:\n    print('no memory')\n"
    )
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert result.stdout == "no memory\n", result.stderr


def test_a_thread_that_cannot_be_stopped_does_not_abort_the_end_of_a_script():
    code = """
import threading, time
from dbnet.errors import ABANDONED, UserError, run_script
def main():
    threading.Thread(target=time.sleep, args=(600,), name=ABANDONED).start()
    print("printed")
    raise UserError("too slow")
run_script(main)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "printed\n", "error: too slow\n")
