"""Grade a submission: the bodies of an assignment's functions, each alone in a clean copy of this source.

    python assignments/grade.py SUBMISSION [--assignment chopgrad] [--json grades.json]

Prints points per function; --json writes the same for a gradebook. What counts is the assignment that the submission's
assignment.txt names, unless --assignment says which.

From the submission comes the text between a graded function's docstring and its end, parsed, checked and written out
anew; nothing else of it is read, and nothing of it is imported. `refusals` admits what these functions need: names of
their own file, plain built-ins, functions of torch and methods of tensors and containers; no imports, no classes, no
private names, no attributes set but those that the original sets. So a body cannot reach os, sys, pytest or the tests.
Each function's tests then run in a process group of their own, from the clean copy, with new random numbers, a time
limit and bounds on memory and file size; its verdict comes through a pipe and counts only with a nonce that the process
was given. Printing, exiting early, looping for ever and editing tests yield nothing.

Not given: isolation by the operating system. The checked body runs with the rights of whoever grades, beside the tests
in one process, and a check of source code is no proof. For hostile submissions run this in a container without network.
"""

import argparse
import ast
import builtins
import collections
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import source  # noqa: E402

LIMIT = 120             # seconds for the tests of one function
MEMORY, FILE = 16 * 2**30, 2**26    # bytes: of address space, and of any one file written

BUILTINS = {"abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "hasattr",
            "int", "isinstance", "iter", "len", "list", "map", "max", "min", "next", "pow", "print", "range", "repr",
            "reversed", "round", "set", "slice", "sorted", "str", "sum", "tuple", "zip",
            *(n for n in dir(builtins) if n.endswith("Error"))}
DENIED = {"load", "save", "from_file", "compile", "seed", "manual_seed", "initial_seed", "set_rng_state", "typename",
          "get_rng_state", "storage", "untyped_storage", "Storage", "UntypedStorage"}
FORBIDDEN = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Global, ast.AsyncFunctionDef, ast.Await, ast.Match)


def attributes() -> set[str]:
    """Names after a dot that are harmless: functions and types of torch, methods of tensors and of containers."""
    modules = (torch, torch.nn.functional, torch.linalg, math)
    free = {n for m in modules for n, v in vars(m).items() if isinstance(v, (torch.dtype, float)) or (
        callable(v) and str(getattr(v, "__module__", "")).startswith(("torch", "math", "None")))}
    for kind in (torch.Tensor, list, dict, tuple, set, str, int, float, slice, range, collections.deque):
        free |= set(dir(kind))
    free |= {"nn", "functional", "linalg", "autograd", "grad", "backward", "weight", "bias", "modules", "named_modules",
             "parameters", "named_parameters", "children", "Parameter"}
    return ({n for n in free if not n.startswith(("_", "set_"))} | {"set_grad_enabled"}) - DENIED


def refusals(body: list[ast.stmt], function: ast.FunctionDef, original: ast.Module, graded: list[str]) -> list[str]:
    """Why a body is not run: one line for each thing in it that such a body has no business with."""
    originals = [n for name in graded for n in ast.walk(source.find(original, name))]
    module = {n for s in original.body for n in bound(s)} | {n.id for n in originals if isinstance(n, ast.Name)}
    own = {n.attr for n in ast.walk(original) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
           and n.value.id == "self"} | {n.target.id for n in ast.walk(original) if isinstance(n, ast.AnnAssign)
                                        and isinstance(n.target, ast.Name)}
    usual = {n.attr for n in originals if isinstance(n, ast.Attribute)}
    settable = {n.attr for n in originals if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load)} | {
        "requires_grad", "grad"}
    nodes = [n for s in body for n in ast.walk(s)]
    local = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)} | {
        n.arg for n in [*nodes, *ast.walk(function.args)] if isinstance(n, ast.arg)} | {
        n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ExceptHandler)) and n.name}
    readable, wrong = attributes() | usual | own, []
    for n in nodes:
        if isinstance(n, FORBIDDEN):
            wrong.append(f"{type(n).__name__} is not for these functions")
        elif isinstance(n, ast.Name) and (n.id not in module | local | BUILTINS or n.id.startswith("__")):
            wrong.append(f"the name {n.id} is not available")
        elif isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and n.attr not in readable:
            wrong.append(f"the attribute .{n.attr} is not available")
        elif isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load) and n.attr not in settable:
            wrong.append(f"the attribute .{n.attr} must not be set")
        elif isinstance(n, (ast.FunctionDef, ast.arg, ast.ExceptHandler)) and str(
                getattr(n, "name", None) or getattr(n, "arg", "")).startswith("__"):
            wrong.append("names with two underscores are not for these functions")
    return list(dict.fromkeys(wrong))


def bound(statement: ast.stmt) -> list[str]:
    """The names that a top-level statement gives to a module."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(a.asname or a.name).split(".")[0] for a in statement.names]
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    return [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def graft(submission: Path, function: str, graded: list[str]) -> str:
    """The clean file with the submission's body for one function; ValueError says why that body is not taken."""
    file, _, name = function.partition("::")
    path, clean = submission / file, (source.ROOT / file).read_text(encoding="utf-8")
    if not path.is_file() or path.stat().st_size > 2**20:
        raise ValueError(f"no file {file}, or one above 1 MB")
    try:
        theirs = source.find(ast.parse(path.read_text(encoding="utf-8")), name)
        body = source.statements(theirs) or [ast.Pass()]
        text = "\n".join(map(ast.unparse, body))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file} cannot be parsed: {error}") from error
    original = ast.parse(clean)
    wrong = refusals(body, source.find(original, name), original,
                     [g.partition("::")[2] for g in graded if g.startswith(f"{file}::")])
    if wrong:
        raise ValueError("; ".join(wrong[:3]))
    return source.splice(clean, name, text)


def run_tests(tree: Path, tests: list[str], seed: int, limit: float = LIMIT) -> tuple[bool, str]:
    """Whether all the tests pass in a tree, and else the first reason why not."""
    nonce, (reading, writing) = secrets.token_hex(16), os.pipe()
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(tree), "TMPDIR": str(tree), "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(source.HERE / "run_tests.py"), str(writing)], cwd=tree, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[writing],
        start_new_session=True, preexec_fn=bounded)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        try:
            process.communicate(json.dumps({"tests": tests, "seed": seed, "nonce": nonce}).encode(), timeout=limit)
        except subprocess.TimeoutExpired:
            return False, f"not done after {limit:g} seconds"
        finally:  # whatever it has started goes with it
            stop(process)
        try:
            answer = json.loads(pipe.read(2**20))
        except ValueError:
            return False, "the process ended without a report"
    if process.returncode != 0 or answer.get("nonce") != nonce:
        return False, "the process ended without a report"
    outcomes = answer["outcomes"]
    missing = [t for t in tests if not any(ran == t or ran.startswith(f"{t}[") for ran in outcomes)]
    if missing or set(outcomes.values()) != {"passed"}:
        return False, answer["message"] or f"did not run: {missing or outcomes}"
    return True, ""


def bounded() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def stop(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def grade(submission: Path, name: str, seed: int, limit: float = LIMIT) -> dict:
    """{assignment, seed, points, of, functions: [{name, points, of, reason}]}"""
    functions, rows = source.read(name)["functions"], []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for file in source.files():
            if file.suffix == ".py" or file.name == "pyproject.toml":
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.ROOT / file, tree / file)
        for function in functions:
            file = function["name"].partition("::")[0]
            try:
                (tree / file).write_text(graft(submission, function["name"], [f["name"] for f in functions]),
                                         encoding="utf-8")
                passed, reason = run_tests(tree, function["tests"], seed, limit)
            except ValueError as error:
                passed, reason = False, str(error)
            shutil.copyfile(source.ROOT / file, tree / file)
            rows.append({"name": function["name"], "points": function["points"] * passed, "of": function["points"],
                         "reason": reason})
    return {"assignment": name, "seed": seed, "points": sum(r["points"] for r in rows),
            "of": sum(r["of"] for r in rows), "functions": rows}


def main(args: argparse.Namespace) -> None:
    if not args.submission.is_dir():
        raise ValueError(f"{args.submission} is no folder")
    said = args.submission / "assignment.txt"
    chosen = args.assignment or (said.read_text().split() if said.is_file() else [])
    if not chosen:
        raise ValueError(f"{said} is missing: say with --assignment which of {', '.join(source.names())} it is")
    seed, grades = secrets.randbelow(2**31) if args.seed is None else args.seed, []
    for name in chosen:
        grades.append(grade(args.submission, name, seed, args.limit))
        for row in grades[-1]["functions"]:
            print(f"{row['points']:3} of {row['of']:3}  {row['name']}  {row['reason'][:200]}".rstrip())
        print(f"{grades[-1]['points']:3} of {grades[-1]['of']:3}  {name}, seed {seed}")
    if args.json:
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps({"submission": args.submission.name, "assignments": grades}, indent=2) + "\n")
        os.replace(part, args.json)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("submission", type=Path, help="the folder that was handed in")
    parser.add_argument("--assignment", nargs="+", metavar="NAME", help="which (default: as its assignment.txt says)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the grades there, too")
    parser.add_argument("--seed", type=int, help="of the tests' random numbers (default: a new one)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for a function's tests (default {LIMIT})")
    args = parser.parse_args()
    try:
        main(args)
    except (ValueError, OSError) as error:
        print("grade.py:", error, file=sys.stderr)
        sys.exit(2)
