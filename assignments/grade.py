"""Grade a submission: the bodies of an assignment's functions, each alone in a clean copy of this source.

    python assignments/grade.py SUBMISSION [--assignment chopgrad] [--json grades.json]

Prints points per function; --json writes the same for a gradebook. What counts is the assignment that the submission's
assignment.txt names, unless --assignment says which.

From the submission comes the text between a graded function's docstring and its end, parsed, checked (check.py) and
written out anew; nothing else of it is read, and nothing of it is imported. Each function has a tree and a process for
itself: its tests run there from the clean copy, with new random numbers, where nothing is written, started or sent and
this source cannot be read (cage.py). The verdict comes through a pipe and counts only with a nonce that the process
was given. Of a failure it says which test and what kind of error, for other text could carry what the body has seen;
--messages prints that too. What all this withstands, and what it does not: assignments/README.md.
"""

import argparse
import ast
import builtins
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
try:
    import cage  # noqa: E402
except ImportError:  # no module resource
    sys.exit("grade.py: not on Windows; use WSL or a container")
import check  # noqa: E402
import source  # noqa: E402

LIMIT = 120         # seconds of processor time for the tests of one function
LARGEST = 2**18     # bytes of a submitted file
ERRORS = {name for name in dir(builtins) if name.endswith("Error")} | {"OutOfMemoryError", "Failed", "Skipped"}


def graft(submission: Path, function: str, graded: list[str]) -> str:
    """The clean file with the submission's body for one function; ValueError says why that body is not taken."""
    file, _, name = function.partition("::")
    path, clean = submission / file, (source.ROOT / file).read_text(encoding="utf-8")
    if path.resolve() != submission.resolve() / file or not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError(f"no file {file} in the folder itself, or one above {LARGEST} bytes")
    try:
        theirs = source.find(ast.parse(path.read_text(encoding="utf-8")), name)
        body = source.statements(theirs) or [ast.Pass()]
        text = "\n".join(map(ast.unparse, body))
        original = ast.parse(clean)
        wrong = check.refusals(body, source.find(original, name), original,
                               [g.partition("::")[2] for g in graded if g.startswith(f"{file}::")])
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file} cannot be parsed: {error}") from error
    if wrong:
        raise ValueError("; ".join(wrong[:3]))
    return source.splice(clean, name, text)


def run_tests(tree: Path, tests: list[str], seed: int, limit: float = LIMIT,
              protections: tuple[str, ...] = ()) -> tuple[bool, str, str]:
    """Whether all the tests pass in a tree; if not, at which with what kind of error, and the error's own text."""
    nonce = secrets.token_hex(16)
    reading, writing = os.pipe()
    job = {"tests": tests, "seed": seed, "nonce": nonce, "seconds": limit, "protections": protections,
           "hidden": [str(source.ROOT), *(str(Path(p) / "mirage_min") for p in sys.path)]}
    environment = {"PATH": os.environ.get("PATH", ""), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                   "CUDA_VISIBLE_DEVICES": "",
                   **dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"), str(tree)),
                   **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(source.HERE / "run_tests.py"), str(writing)], cwd=tree, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[writing],
        start_new_session=True)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        try:
            # processor time is what is limited; this is for one that sleeps, on a machine twenty times as slow
            process.communicate(json.dumps(job).encode(), timeout=60 + 20 * limit)
        except subprocess.TimeoutExpired:
            return False, "it waits for ever", ""
        finally:
            stop(process)
        if -process.returncode in (signal.SIGXCPU, signal.SIGKILL):
            return False, f"not done after {limit:g} seconds of processor time", ""
        return verdict(pipe.read(2**20), process.returncode, nonce, tests)


def stop(process: subprocess.Popen) -> None:
    """End a process, and what it has started where it could."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def verdict(report: str, status: int, nonce: str, tests: list[str]) -> tuple[bool, str, str]:
    """What a report says, if it is one. It may be forged: it decides on this function alone and chooses no words."""
    try:
        answer = json.loads(report)
        told = status == 0 and answer["nonce"] == nonce
        outcomes = {str(test): str(outcome) for test, outcome in answer["outcomes"].items()}
        error, message = str(answer["error"]), str(answer["message"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        told = False
    if not told:
        return False, "the process ended without a report", ""
    for test in tests:
        ran = {outcomes[name] for name in outcomes if name == test or name.startswith(f"{test}[")}
        if ran - {"passed", "not run"}:
            return False, f"{test}: {error if error in ERRORS else 'an error'}", message
    missing = [t for t in tests if not any(name == t or name.startswith(f"{t}[") for name in outcomes)]
    passed = not missing and set(outcomes.values()) == {"passed"}
    return passed, "" if passed else f"{(missing or tests)[0]}: did not run", "" if passed else message


def plain(text: str) -> str:
    """One printable line of ASCII, whatever it was."""
    return ascii(text)[1:-1]


def grade(submission: Path, name: str, seed: int, limit: float = LIMIT, protections: tuple[str, ...] = ()) -> dict:
    """{assignment, seed, protections, points, of, functions: [{name, points, of, reason, message}]}"""
    assignment, rows = source.read(name), []
    functions = assignment["functions"]
    for function in functions:
        passed, reason, message = False, "", ""
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder).resolve()
            source.copy_tree(tree, [assignment])
            try:
                text = graft(submission, function["name"], [f["name"] for f in functions])
                (tree / function["name"].partition("::")[0]).write_text(text, encoding="utf-8")
                passed, reason, message = run_tests(tree, function["tests"], seed, limit, protections)
            except ValueError as error:
                reason = str(error)
        rows.append({"name": function["name"], "points": function["points"] * passed, "of": function["points"],
                     "reason": plain(reason)[:200], "message": plain(message)[:500]})
    return {"assignment": name, "seed": seed, "protections": protections, "points": sum(r["points"] for r in rows),
            "of": sum(r["of"] for r in rows), "functions": rows}


def main(args: argparse.Namespace) -> None:
    if not args.submission.is_dir():
        raise ValueError(f"{args.submission} is no folder")
    said = args.submission / "assignment.txt"
    there = said.is_file() and said.stat().st_size < LARGEST
    chosen = args.assignment or (said.read_text(encoding="utf-8").split() if there else [])
    if not chosen:
        raise ValueError(f"{said} is missing: say with --assignment which of {', '.join(source.names())} it is")
    protections = cage.available()
    if missing := [name for name in cage.PROTECTIONS if name not in protections]:
        print(f"grade.py: no {' and no '.join(missing)} here; bodies that you do not trust want a container "
              "(assignments/README.md)", file=sys.stderr)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    grades = []
    for name in dict.fromkeys(chosen):
        grades.append(grade(args.submission, name, seed, args.limit, protections))
        for row in grades[-1]["functions"]:
            if not args.messages:
                row["message"] = ""
            print(f"{row['points']:3} of {row['of']:3}  {row['name']}  {row['reason']}  {row['message']}".rstrip())
        print(f"{grades[-1]['points']:3} of {grades[-1]['of']:3}  {name}, seed {seed}")
    if args.json:
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps({"submission": args.submission.name, "assignments": grades}, indent=2) + "\n")
        os.replace(part, args.json)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("submission", type=Path, help="the folder that was handed in")
    parser.add_argument("--assignment", nargs="+", metavar="NAME", help="which (default: as its assignment.txt says)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the grades there, too")
    parser.add_argument("--seed", type=int, help="of the tests' random numbers (default: a new one)")
    parser.add_argument("--limit", type=float, default=LIMIT,
                        help=f"seconds of processor time for a function's tests (default {LIMIT})")
    parser.add_argument("--messages", action="store_true", help="print what errors say, too, which bodies may choose")
    args = parser.parse_args()
    try:
        main(args)
    except (ValueError, OSError) as error:
        print("grade.py:", error, file=sys.stderr)
        sys.exit(2)
