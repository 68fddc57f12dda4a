"""desk.py: every way that a command can end is one line and a status, and what is done stays done."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from mirage_min.data import desk
from mirage_min.networks import weights
from mirage_min.networks.checked import Within
from tests import signals

ROOT = Path(__file__).parents[1]
SCRIPTS = ("infer.py", "evaluate.py", "build_pairs.py", "convert.py", "encode_prompt.py")


def raises(error):
    def run():
        raise error
    return run


@pytest.mark.parametrize("error, status, line", [
    (ValueError("a.mp4:\n  holds no video"), 2, "x.py: a.mp4: holds no video"),
    (OSError(28, "No space left", "b.mp4"), 2, "x.py: [Errno 28] No space left: 'b.mp4'"),
    (ImportError("no cv2"), 2, "x.py: no cv2"),
    (MemoryError("9 GiB"), 2, "x.py: the memory does not suffice (fewer tiles): 9 GiB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9\nTry"), 2,
     "x.py: the memory does not suffice (fewer tiles): DefaultCPUAllocator: can't allocate memory: 9"),
    (KeyboardInterrupt(), 130, "x.py: stopped by SIGINT; nothing was written"),
    (KeyboardInterrupt(signal.SIGTERM), 143, "x.py: stopped by SIGTERM; nothing was written"),
])
def test_every_error_of_a_user_is_one_line_and_its_status(capsys, error, status, line):
    assert desk.serve("x.py", raises(error), memory="fewer tiles") == status
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("sizes do not match"), TypeError("x")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        desk.serve("x.py", raises(error))


def test_a_run_that_returns_has_that_status(capsys):
    assert (desk.serve("x.py", lambda: None), desk.serve("x.py", lambda: 1)) == (0, 1)
    assert capsys.readouterr() == ("", "")


def test_a_signal_once_the_output_is_written_is_ignored_and_one_that_nobody_catches_stays_as_it_is():
    before = {number: signal.getsignal(number) for number in desk.SIGNALS}
    try:
        desk.ignore_signals()
        assert {number: signal.getsignal(number) for number in desk.SIGNALS} == before
        desk.catch_signals()
        desk.ignore_signals()
        assert desk.serve("x.py", lambda: signal.raise_signal(signal.SIGTERM)) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Settings:
    crf: Annotated[int, Within(0, 51)] = 16
    fps: float = 25.0
    fast: bool = False


@pytest.mark.parametrize("setting, said", [
    ("crf=52", "crf: wanted an integer from 0 to 51, got 52"), ("crf=-1", "got -1"), (f"crf={10**20}", "from 0 to 51"),
    ("crf=1.5", "crf must be int, got '1.5'"), ("fps=nan", "fps: wanted one finite number, got nan"),
    ("fps=inf", "one finite"), ("fast=perhaps", "fast must be bool"), ("crf", "crf must be int, got ''"),
    ("slow=1", "unknown key 'slow', there are crf, fps, fast"), ("=", "unknown key ''")])
def test_a_setting_of_another_kind_or_out_of_range_is_refused_with_its_text(setting, said):
    with pytest.raises(ValueError, match=f"^--set {re.escape(setting)}: .*{re.escape(said)}"):
        desk.override(Settings(), [setting])


def test_settings_have_the_kind_of_their_field():
    changed = desk.override(Settings(), ["crf=0", "fps=10", "fast=yes"])
    assert changed == Settings(0, 10.0, True) and type(changed.fps) is float


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(ValueError, match=f"--device {name}: there is none that this torch can use"):
        desk.choose_device(name)


@pytest.mark.parametrize("status", [None, "Name: python\nVmRSS: 12 kB\n"])
def test_memory_that_the_system_does_not_tell_is_unknown(monkeypatch, status):
    def read_text(path, *args, **settings):
        if status is None:
            raise FileNotFoundError(str(path))
        return status
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(sys, "platform", "linux")
    assert desk.peak_memory().startswith("peak memory unknown")


# ---- processes -------------------------------------------------------------------------------------------------------

END = """if True:
    import ctypes, sys
    from mirage_min.data import desk
    desk.open_up()
    for step in desk.bar(range(3)):
        pass
    def run():
        open(sys.argv[1], "w").write("whole")
        desk.say_error("note")
        ctypes.CDLL(None).write(2, b"of a library", 12)
        desk.say("\\u2191 caf\\u00e9 \\u65e5\\u672c \\udcff")
    sys.exit(desk.serve("x.py", run))"""


def shell(line: str, *arguments, **settings):
    """A shell's line in which $PY is this Python with the program END -> the finished process."""
    command = ["bash", "-c", line.replace("$PY", '"$0" -c "$1" "$2"'), sys.executable, END, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", **settings)


@pytest.mark.parametrize("line", ["$PY", "$PY 2>&-", "$PY >&-", "$PY <&- >&- 2>&-", "$PY > /dev/full",
                                  "$PY 2> /dev/full", "set -o pipefail; $PY | true", "PYTHONIOENCODING=ascii $PY",
                                  "PYTHONIOENCODING=cp1252 $PY"])
def test_what_is_said_after_the_output_is_written_does_not_undo_it(tmp_path, line):
    if "/dev/full" in line and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = shell(line, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "whole", "a library's warning went into the file"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_letter_that_the_console_lacks_is_a_question_mark(tmp_path):
    assert shell("PYTHONIOENCODING=cp1252 $PY", tmp_path / "out").stdout.startswith("? caf")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupt_while_the_imports_are_loaded_is_one_line(script, tmp_path):
    """A module that takes for ever stands in torch's place."""
    (tmp_path / "torch.py").write_text("import sys, time\nprint('loading', flush=True)\nfor _ in range(6000):\n"
                                       "    time.sleep(0.1)\n")
    program = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = [{script!r}]; " \
              f"runpy.run_path({script!r}, run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=signals.heard)
    assert process.stdout.readline() == "loading\n", process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, f"{script}: stopped by SIGINT; nothing was written\n")


DESTRUCTOR = """
import sys, time
from mirage_min.data import desk

class Slow:
    def __del__(self):
        print("here", flush=True)
        time.sleep(600)

def run():
    Slow()
    for _ in range(1000):  # without end, as far as a signal is concerned
        time.sleep(0.01)

desk.catch_signals()
sys.exit(desk.serve("slow.py", run))
"""


def test_a_signal_that_comes_while_a_destructor_runs_is_not_lost():
    """Python prints what is raised there and goes on; a run would go on for ever, deaf to further signals."""
    with subprocess.Popen([sys.executable, "-c", DESTRUCTOR], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=signals.heard) as child:
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate()
    assert (child.returncode, said) == (143, "slow.py: stopped by SIGTERM; nothing was written\n")


def test_an_interrupt_that_a_library_swallows_comes_again_between_two_steps(capsys):
    def run():
        for step in range(9):
            desk.heed()
            with contextlib.suppress(KeyboardInterrupt):
                desk.interrupt(signal.SIGTERM, None)
            steps.append(step)
    steps = []
    assert desk.serve("deaf.py", run) == 143 and steps == [0]
    assert capsys.readouterr().err == "deaf.py: stopped by SIGTERM; nothing was written\n"
    assert desk.serve("next.py", desk.heed) == 0, "of the run before"


def test_the_desk_opens_before_anything_large_is_loaded():
    program = "import sys; from mirage_min.data import desk; desk.open_up(); " \
              "sys.exit(bool({'torch', 'av', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_every_script_has_a_help_where_python_keeps_no_docstrings():
    program = f"""if True:
        import runpy, sys
        for script in {SCRIPTS}:
            sys.argv = [script, "--help"]
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as stop:
                assert stop.code == 0"""
    done = subprocess.run([sys.executable, "-OO", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(SCRIPTS), done.stderr


def test_ctrl_c_ends_a_command_with_workers_in_one_line_and_its_files_are_whole(tmp_path):
    """A terminal sends it to every process of the command. Other commands have their workers from the same function."""
    process = subprocess.Popen([sys.executable, "-m", "mirage_min.data.toy_world", "--out", str(tmp_path), "--clips",
                                "1000", "--size", "16x24", "--frames", "2", "--workers", "2"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=signals.heard)
    while not list(tmp_path.glob("*.safetensors")) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()
    assert (process.returncode, *said) == (130, "", "toy_world: stopped by SIGINT; the clips that are whole stay\n")
    assert all(path.suffix == ".safetensors" and weights.load_tensors(path) for path in tmp_path.iterdir())
    users = [path.name for path in (ROOT / "mirage_min").rglob("*.py") if "ProcessPool" in path.read_text()]
    assert users == ["desk.py"]


def fail_at(place: int, number: int, folder: Path) -> None:
    (folder / str(number)).touch()
    if number == place:
        raise ValueError(f"number {number}")
    time.sleep(0.05)


class Garbage:
    """It refers to itself, so that the collector alone frees it, and notes which process did."""

    def __init__(self, note):
        self.note, self.itself = note, self

    def __del__(self):
        self.note.write_text(self.note.read_text() + f"{os.getpid()} ")


def test_a_worker_frees_nothing_that_its_parent_left(tmp_path):
    """A video's converter waits, when it is freed, for threads that a forked process does not have."""
    note = tmp_path / "freed by"
    note.write_text("")
    gc.disable()
    try:
        Garbage(note)
        desk.share(gc.collect, [(), ()], 2, "clip")
        assert note.read_text() == ""
    finally:
        gc.enable()
    gc.collect()
    assert note.read_text() == f"{os.getpid()} " and gc.get_freeze_count() == 0


def test_the_first_error_of_a_worker_ends_the_work_and_a_killed_one_is_said(tmp_path):
    with pytest.raises(ValueError, match="number 3"):
        desk.share(fail_at, [(3, number, tmp_path) for number in range(2_000)], 2, "clip")
    assert len(list(tmp_path.iterdir())) < 2_000, "what had not begun was done all the same"
    with pytest.raises(OSError, match="one of 1 processes was killed, perhaps for want of memory"):
        desk.share(os._exit, [(9,)], 1, "clip")
