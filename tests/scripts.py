"""Run a script or a module as a process of its own that need not import torch again: it is forked from one that has.

    done = scripts.run("-m", "mirage_min.method.lora", cwd=tmp_path)     # as python -m mirage_min.method.lora
    done = scripts.run("evaluate.py", "--help")                          # as python evaluate.py --help
    done.returncode, done.stdout, done.stderr

What depends on the interpreter itself (its flags, its environment, its signals) is tried by subprocess instead.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

warm = multiprocessing.get_context("forkserver")
# torch imports _dynamo with the first optimizer, which takes more than a second
warm.set_forkserver_preload(["torch", "torch._dynamo", "av", "numpy", "einops", "PIL.Image", "safetensors.torch",
                             "tqdm"])


def run(*argv, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """argv: "-m", module, arguments, or script, arguments; a script is named from the project's root."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = warm.Process(target=become, args=([str(a) for a in argv], cwd, out, err))
        process.start()
        process.join()
        return subprocess.CompletedProcess(argv, process.exitcode, out.read_text(), err.read_text())


def become(argv: list[str], cwd: Path, out: Path, err: Path) -> None:
    """In the forked process."""
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.chdir(cwd)
    sys.path[0] = str(ROOT)
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(ROOT / argv[0]), *argv[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
