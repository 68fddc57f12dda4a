"""Do the tests notice? 300 mistakes planted one at a time in the package's arithmetic, each run against its tests.

    python tests/mutation.py --out runs/mutation.jsonl               # goes on where it was stopped; lists the survivors
    python tests/mutation.py --out runs/mutation.jsonl --count 6     # the first six of the same sample
    python tests/mutation.py --list chopgrad.py                      # the mistakes that one file offers

A mistake is one changed expression: a sign (a + b for a - b, a for -a), a scale (a / b for a * b, twice a number), a
dropped term (a for a + b), an index (i + 1 for i), an axis (another dim), a bound (<= for <). The sample is fixed:
drawn by seed 0 from all places in the order of the files, so it changes only where the package does. Each is planted in
a temporary copy of the tree, and the tests named for its file run until the first fails. Left alone: error messages,
demonstrations, default values, annotations, and the bare numbers of toy_*.py, which are taste (how long a car is).
Before the first mistake of a file its tests have to pass, and their time sets the limit: ten times as long, a minute at
least. What takes longer is listed by itself, for it may be an endless loop or a busy machine. Which survivors mean the
same as the original is for a reader to decide.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # {concept: its test files}, where one is not called like the other
    "toy_render": ["toy_world"], "scene": ["pairs"], "splat": ["splat", "align"], "decode": ["video"], "run": ["train"],
    "toy_scene": ["pairs", "align"], "vae_wan": ["vae_wan"], "pairs": ["pairs", "train"],
}
DIMS = ("dim", "dims", "start_dim")


def mutants(node: ast.AST):
    """(kind, another node) for every mistake that can stand in this node's place."""
    if isinstance(node, ast.BinOp):
        swap = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
        if type(node.op) in swap and not isinstance(node.left, (ast.Tuple, ast.List, ast.ListComp)):
            kind = "sign" if isinstance(node.op, (ast.Add, ast.Sub)) else "scale"
            yield kind, ast.BinOp(node.left, swap[type(node.op)](), node.right)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            yield "dropped", node.left
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and type(node.value) is float:
        yield "scale", ast.Constant(2 * node.value if node.value else 1.0)
    elif isinstance(node, ast.Subscript):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for k, item in enumerate(items):
            if isinstance(item, ast.Constant) and type(item.value) is int:
                changed = copy.deepcopy(node)
                place = changed.slice.elts[k] if isinstance(node.slice, ast.Tuple) else changed.slice
                place.value += 1 if item.value < 1 else -1
                yield "index", changed
            elif isinstance(item, ast.Slice) and (item.lower or item.upper):
                changed = copy.deepcopy(node)
                place = changed.slice.elts[k] if isinstance(node.slice, ast.Tuple) else changed.slice
                side = "lower" if item.lower else "upper"
                setattr(place, side, ast.BinOp(getattr(place, side), ast.Add(), ast.Constant(1)))
                yield "index", changed
    elif isinstance(node, ast.Call):
        for k, word in enumerate(node.keywords):
            values = word.value.elts if isinstance(word.value, ast.Tuple) else [word.value]
            if word.arg in DIMS and all(isinstance(v, ast.Constant) and type(v.value) is int for v in values):
                changed = copy.deepcopy(node)
                place = changed.keywords[k].value
                (place.elts[-1] if isinstance(place, ast.Tuple) else place).value += -1 if values[-1].value > 1 else 1
                yield "axis", changed
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        swap = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
        if type(node.ops[0]) in swap:
            yield "bound", ast.Compare(node.left, [swap[type(node.ops[0])]()], node.comparators)


def places(tree: ast.AST):
    """The nodes of a module where a mistake would be one of arithmetic, in the order of the file."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "defaults", "kw_defaults", "ctx"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST) and not skipped(node):
                yield node
                yield from places(node)


def skipped(node: ast.AST) -> bool:
    main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    return main or isinstance(node, (ast.Raise, ast.JoinedStr, ast.AnnAssign, ast.Import, ast.ImportFrom))


def candidates(file: str) -> list[dict]:
    """Every mistake in a file of the package: {file, line, kind, old, new, span}, span in bytes."""
    data = (ROOT / "mirage_min" / file).read_bytes()
    starts, found = [0], []
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in places(ast.parse(data)):
        for kind, new in mutants(node):
            if isinstance(node, ast.Constant) and file.startswith("toy_"):
                continue
            a, b = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            found.append({"file": file, "line": node.lineno, "kind": kind, "old": data[a:b].decode(),
                          "new": f"({ast.unparse(new)})", "span": [a, b]})
    return found


def sample(count: int) -> list[dict]:
    every = [m for path in sorted((ROOT / "mirage_min").glob("*.py")) for m in candidates(path.name)]
    return random.Random(0).sample(every, min(300, len(every)))[:count]


def tests_of(file: str) -> list[str]:
    names = TESTS.get(Path(file).stem, [Path(file).stem])
    return [f"tests/test_{n}.py" for n in names if (ROOT / "tests" / f"test_{n}.py").is_file()]


def copy_tree(folder: Path) -> Path:
    """What the tests need, in a temporary folder, with ../shared beside it where there is one."""
    tree = folder / "tree"
    unneeded = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs", "data", "venv", ".venv")
    shutil.copytree(ROOT, tree, ignore=unneeded)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return tree


def run(tree: Path, tests: list[str], limit: float | None) -> tuple[int | None, str]:
    """Exit status (None: the time ran out) and the first failure."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line",
               *tests]
    process = subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
    except BaseException as stop:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(stop, subprocess.TimeoutExpired):
            return None, f"not done after {limit:.0f} seconds"
        raise
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return process.returncode, failed[0][:160] if failed else f"exit status {process.returncode}"


def try_one(tree: Path, mutant: dict, limits: dict[str, float]) -> dict:
    """The mutant with its outcome ("caught", "SURVIVES", "too long", or "untested": no test file), why, and seconds."""
    path, tests, start = tree / "mirage_min" / mutant["file"], tests_of(mutant["file"]), time.time()
    if not tests:
        return mutant | {"outcome": "untested", "why": "no test file"}
    if str(tests) not in limits:
        status, why = run(tree, tests, None)
        if status != 0:
            sys.exit(f"{tests} fail without any mistake: {why}")
        limits[str(tests)] = max(60.0, 10 * (time.time() - start))
    whole, (a, b) = path.read_bytes(), mutant["span"]
    path.write_bytes(whole[:a] + mutant["new"].encode() + whole[b:])
    status, why = run(tree, tests, limits[str(tests)])
    path.write_bytes(whole)
    outcome = "too long" if status is None else "SURVIVES" if status == 0 else "caught"
    return mutant | {"outcome": outcome, "why": why, "seconds": round(time.time() - start, 1)}


def main(args: argparse.Namespace) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    wanted = sample(args.count)
    known = {json.dumps([d[k] for k in ("file", "span", "old", "new")]): d for d in done}
    results, limits = [], {}
    with tempfile.TemporaryDirectory() as folder, args.out.open("a") as log:
        tree = copy_tree(Path(folder))
        for k, mutant in enumerate(wanted):
            result = known.get(json.dumps([mutant[key] for key in ("file", "span", "old", "new")]))
            if result is None:
                result = try_one(tree, mutant, limits)
                log.write(json.dumps(result) + "\n")
                log.flush()
                print(f"{k + 1}/{len(wanted)} {describe(result)}", flush=True)
            results.append(result)
    for outcome in ("caught", "too long", "untested", "SURVIVES"):
        found = [r for r in results if r["outcome"] == outcome]
        print(f"{outcome}: {len(found)} of {len(results)}")
        for result in found if outcome != "caught" else []:
            print("   ", describe(result))


def describe(m: dict) -> str:
    change = f"{m['kind']}: {' '.join(m['old'].split())} -> {m['new']}"
    return f"{m.get('outcome', '')} {m['file']}:{m['line']} {change}  {m.get('why', '')}".strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mutation.jsonl"), help="results, one JSON a line")
    parser.add_argument("--count", type=int, default=300, help="the first so many of the sample (default 300)")
    parser.add_argument("--list", metavar="FILE", help="only print the mistakes that a file of the package offers")
    args = parser.parse_args()
    if args.list:
        print("\n".join(describe(m) for m in candidates(args.list)))
    else:
        main(args)
