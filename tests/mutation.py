"""Do the tests notice? 300 mistakes planted one at a time in what computes, each run against its tests.

    python tests/mutation.py --out runs/mutation.jsonl               # continues where it was stopped; names survivors
    python tests/mutation.py --out runs/mutation.jsonl --count 6     # the first six of the same sample
    python tests/mutation.py --out runs/fresh.jsonl --seed 1         # another sample: tests may be made for the first
    python tests/mutation.py --list mirage_min/method/chopgrad.py    # the mistakes that one file offers

Planted in the package, in the scripts at the top and in the experiments. A mistake is one changed expression: a sign
(a + b for a - b, a for -a), a scale (a / b for a * b, twice a number), a dropped term (a for a + b), an index (i + 1
for i), an axis (another dim), a bound (<= for <). The sample is fixed: drawn by a seed from all places in the order of
the files, so it changes only where they do. Left alone: sums of texts and lists, paths, error messages, what is under
`__main__` or in `demonstrate`, default values, annotations, flags, pictures (functions named draw_...), the papers'
numbers (PAPER), and the bare numbers of toy_*.py, which are taste (how long a car is).

Each is planted in a temporary copy of the tree, and the test files of its concept run there, the fastest tests first,
until one fails. That is a fork of a process which has torch, diffusers and pytest loaded, but nothing of this project.
Left out are the tests that kill runs (SLOW). Before the first mistake of a concept its tests have to pass, and the
processor time they take sets the limit: four times as much and a minute. A mistake that takes longer is in an endless
loop or near one, and is listed by itself; one that asks for more than MEMORY fails; one in a file that no test is about
survives. Which survivors mean the same as the original is for a reader to decide: tests/README.md.
"""

import argparse
import ast
import copy
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # {file or folder: its tests}, a file's where they are not tests/test_NAME.py; test_mutation.py holds it
    "mirage_min/data/toy_render.py": "toy_world toy_paths toy_shapes",
    "mirage_min/data/toy_shapes.py": "toy_world toy_shapes",
    "mirage_min/data/toy_light.py": "toy_world toy_shapes", "mirage_min/data/toy_street.py": "toy_world toy_paths",
    "mirage_min/data/toy_paths.py": "toy_paths toy_world",
    "mirage_min/data/scene.py": "scene build_pairs",
    "mirage_min/data/scene_cameras.py": "scene_cameras scene", "mirage_min/data/toy_scene.py": "build_pairs",
    "mirage_min/data/insertion.py": "build_pairs", "mirage_min/data/street_camera.py": "street",
    "mirage_min/data/shots.py": "streams", "mirage_min/data/isp.py": "streams",
    "mirage_min/data/reconstruct.py": "streams", "mirage_min/data/vehicles.py": "vehicles",
    "mirage_min/data/video.py": "video sound", "mirage_min/data/clips.py": "crops build_pairs",
    "mirage_min/data/colour.py": "decode video", "mirage_min/data/demux.py": "decode sound",
    "mirage_min/data/due.py": "decode", "mirage_min/data/pixels.py": "video",
    "mirage_min/data/matroska.py": "containers decode", "mirage_min/data/boxes.py": "containers decode",
    "mirage_min/data/containers.py": "containers decode",
    "mirage_min/data/results.py": "evaluate", "mirage_min/method/camera.py": "splat latent_memory street",
    "mirage_min/networks/bands.py": "frugal", "mirage_min/networks/vae_cogvideox.py": "vae_cogvideox frugal",
    "mirage_min/networks/wan_names.py": "vae_wan dit_wan",
    "mirage_min/networks/wan_blocks.py": "vae_wan vae_wan22", "mirage_min/networks/config.py": "weights",
    "mirage_min/networks/hub.py": "hub weights", "mirage_min/networks/i3d.py": "backbones",
    "mirage_min/networks/rotary.py": "dit_wan dit_cogvideox dit_cosmos",
    "mirage_min/networks/small_base.py": "train_base", "mirage_min/training/latents.py": "train_base",
    "mirage_min/systems/mirage_folder.py": "mirage_folder adapters",
    "mirage_min/data/masks.py": "restore", "mirage_min/systems/restore_folder.py": "restore",
    "mirage_min/networks/unet_attention.py": "unet_2d", "mirage_min/networks/vae_wan.py": "vae_wan frugal",
    "mirage_min/training/run.py": "run train",
    "encode_prompt.py": "prompt", "train_vae.py": "train_equations train distributed",
    "train_harmonize.py": "train_equations train distributed", "train_online.py": "train_online",
    "experiments": "experiments", "experiments/harmonizers.py": "harmonizer_experiments",
    "experiments/harmonizer_losses.py": "harmonizer_experiments",
    "experiments/harmonizer_streams.py": "harmonizer_experiments",
    "experiments/harmonizer_temporal.py": "harmonizer_experiments",
    "experiments/world_memories.py": "world_study", "experiments/world_report.py": "world_study",
    "experiments/speed_r3d2.py": "speed",
    "experiments/chopgrad_locality.py": "locality",
    "experiments/chopgrad_memory.py": "locality chopgrad", "experiments/walkthrough_figures.py": "locality",
    "experiments/walkthrough_notebook.py": "walkthrough",
    "experiments/skip_vae.py": "tables",
    "experiments/tables.py": "tables", "experiments/mirage_table1.py": "tables",
    "experiments/mirage_table2.py": "tables", "experiments/mirage_table3.py": "tables",
    "experiments/mirage_table4.py": "tables", "experiments/r3d2_table5.py": "tables",
    "experiments/chopgrad_table4.py": "tables", "experiments/stage_h_losses.py": "tables",
    "experiments/restorers.py": "restore_tables",
    "experiments/restore_table1.py": "restore_tables", "experiments/restore_table2.py": "restore_tables",
    "experiments/restore_table3.py": "restore_tables", "train_restore.py": "train_restore distributed",
}
SLOW = "not killed"  # names of tests, as for pytest's -k
MEMORY = 10 * 2**30  # bytes of address space: some mistakes ask for all there is
LOADED = ("scipy.linalg", "skimage.metrics", "einops", "safetensors.torch", "PIL.Image", "av", "tqdm",
          "tests.torchvision_stub", "diffusers.loaders", "diffusers.models.autoencoders.autoencoder_kl_wan",
          "diffusers.models.autoencoders.autoencoder_kl_cogvideox", "diffusers.models.transformers.transformer_wan",
          "diffusers.models.transformers.cogvideox_transformer_3d")
DIMS = ("dim", "dims", "start_dim")


def mutants(node: ast.AST):
    """(kind, another node) for every mistake that can stand in this node's place."""
    if isinstance(node, ast.BinOp) and not joins(node):
        swap = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
        if type(node.op) in swap:
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


def joins(node: ast.AST) -> bool:
    """Whether an expression joins texts, lists or parts of a path: that is no arithmetic."""
    if isinstance(node, ast.BinOp):
        return joins(node.left) or joins(node.right)
    text = isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    return text or isinstance(node, (ast.JoinedStr, ast.Tuple, ast.List, ast.ListComp, ast.Dict, ast.DictComp))


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
    """Whether nothing is planted in a statement or an expression."""
    main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    shows = isinstance(node, ast.FunctionDef) and (node.name.startswith("draw_") or node.name == "demonstrate")
    flag = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument")
    known = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAPER"
    words = isinstance(node, (ast.Raise, ast.JoinedStr, ast.AnnAssign, ast.Import, ast.ImportFrom))
    return main or shows or flag or known or words


def candidates(file: str) -> list[dict]:
    """Every mistake in a file, named from the root: {file, line, kind, old, new, span}, span in bytes."""
    data = (ROOT / file).read_bytes()
    starts, found = [0], []
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in places(ast.parse(data)):
        for kind, new in mutants(node):
            if isinstance(node, ast.Constant) and Path(file).name.startswith("toy_"):
                continue
            a, b = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            found.append({"file": file, "line": node.lineno, "kind": kind, "old": data[a:b].decode(),
                          "new": f"({ast.unparse(new)})", "span": [a, b]})
    return found


def files() -> list[str]:
    """Everything that computes: the package, the scripts at the top, the experiments; named from the root, sorted."""
    found = [*(ROOT / "mirage_min").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def sample(count: int, seed: int = 0) -> list[dict]:
    """The first `count` of the 300 mistakes of a seed."""
    every = [m for file in files() for m in candidates(file)]
    return random.Random(seed).sample(every, min(300, len(every)))[:count]


def tests_of(file: str) -> tuple[str, ...]:
    """The test files of a file, those that exist."""
    path = Path(file)
    for names in (TESTS.get(file, path.stem), TESTS.get(path.parent.as_posix(), "")):
        tests = tuple(f"tests/test_{name}.py" for name in names.split())
        if found := tuple(test for test in tests if (ROOT / test).exists()):
            return found
    return ()


def copy_tree(folder: Path) -> Path:
    """What the tests need, in a temporary folder, with ../shared next to it where there is one."""
    tree = folder / "tree"
    everywhere = shutil.ignore_patterns("__pycache__", ".*_cache")
    on_top = shutil.ignore_patterns(".git", "runs", "data", "venv", ".venv")  # not mirage_min/data

    def unneeded(at: str, names: list[str]) -> set[str]:
        return everywhere(at, names) | (on_top(at, names) if Path(at) == ROOT else set())
    shutil.copytree(ROOT, tree, ignore=unneeded)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return tree


def load() -> None:
    """Import what all tests share, so that a fork need not."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # a fork has no other threads
    sys.path.insert(0, str(ROOT))
    for name in LOADED:
        try:
            module = importlib.import_module(name)
            getattr(module, "stub", lambda: None)()
        except ImportError:
            print(f"without {name}: the tests that need it are skipped")
    kept.extend(sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "tests")
    sys.path.remove(str(ROOT))


kept = []  # torchvision_stub, whose operators live as long as it does


class Watch:
    """A plugin of pytest: the fastest tests first, by the seconds of an earlier run; notes seconds and the failure."""

    def __init__(self, seconds: dict[str, float]):
        self.known, self.seconds, self.failed = seconds, {}, None

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.known.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed = self.failed or f"{report.nodeid} cannot be imported"


def child(tree: Path, tests: tuple[str, ...], known: dict[str, float], limit: float | None, pipe) -> None:
    """Run the tests in this process and send (exit status, first failure, {test: seconds}, processor seconds)."""
    os.setsid()
    os.chdir(tree)
    sys.path[0] = str(tree)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if limit:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    sys.dont_write_bytecode = limit is not None  # of the tests only the first run's, which has no mistake
    watch = Watch(known)
    status = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "-k", SLOW, *tests], [watch])
    pipe.send((int(status), watch.failed, watch.seconds, sum(os.times()[:2])))
    os._exit(0)


def run(tree: Path, tests: tuple[str, ...], known: dict[str, float], limit: float | None):
    """What `child` sends; exit status None where the time ran out."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(tree, tests, known, limit, theirs))
    process.start()
    theirs.close()
    try:
        # a process that waits for ever uses no processor time
        return ours.recv() if ours.poll(20 * limit if limit else None) else (None, "waits for ever", {}, 0.0)
    except EOFError:  # it was ended
        return None, f"ended after {limit:.0f} seconds of processor time, or crashed", {}, 0.0
    finally:
        if process.is_alive():
            process.join(5)
        process.kill()
        process.join()


def try_one(tree: Path, mutant: dict, clean: dict[tuple, tuple]) -> dict:
    """The mutant with its outcome ("caught", "SURVIVES" or "too long"), why, and seconds."""
    path, tests, start = tree / mutant["file"], tests_of(mutant["file"]), time.time()
    if not tests:
        return mutant | {"outcome": "SURVIVES", "why": "no test is about this file", "seconds": 0.0}
    if tests not in clean:
        clean[tests] = run(tree, tests, {}, None)
        if clean[tests][0] != 0:
            sys.exit(f"{tests} fails without any mistake: {clean[tests][1]}")
    whole, (a, b) = path.read_bytes(), mutant["span"]
    path.write_bytes(whole[:a] + mutant["new"].encode() + whole[b:])
    status, why, _, _ = run(tree, tests, clean[tests][2], 60 + 4 * clean[tests][3])
    path.write_bytes(whole)
    outcome = "too long" if status is None else "SURVIVES" if status == 0 else "caught"
    return mutant | {"outcome": outcome, "why": why, "seconds": round(time.time() - start, 1)}


def main(args: argparse.Namespace) -> None:
    """Plant what is not in the log yet, then say how many were noticed, and list the others."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text().splitlines(keepends=True) if args.out.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # a killed run may leave half of one
    args.out.write_text("".join(lines))
    done = [json.loads(line) for line in lines]
    wanted = sample(args.count, args.seed)
    if without := [file for file in files() if candidates(file) and not tests_of(file)]:
        print("no test is about", ", ".join(without))
    known = {json.dumps([d[k] for k in ("file", "span", "old", "new")]): d for d in done}
    results, clean = [], {}
    load()
    with tempfile.TemporaryDirectory() as folder, args.out.open("a") as log:
        tree = copy_tree(Path(folder))
        for k, mutant in enumerate(wanted):
            result = known.get(json.dumps([mutant[key] for key in ("file", "span", "old", "new")]))
            if result is None:
                result = try_one(tree, mutant, clean)
                log.write(json.dumps(result) + "\n")
                log.flush()
                print(f"{k + 1}/{len(wanted)} {describe(result)}", flush=True)
            results.append(result)
    for outcome in ("caught", "too long", "SURVIVES"):
        found = [r for r in results if r["outcome"] == outcome]
        print(f"{outcome}: {len(found)} of {len(results)}")
        for result in found if outcome != "caught" else []:
            print("   ", describe(result))


def describe(m: dict) -> str:
    """A mistake and its outcome in one line."""
    change = f"{m['kind']}: {' '.join(m['old'].split())} -> {m['new']}"
    return f"{m.get('outcome', '')} {m['file']}:{m['line']} {change}  {m.get('why', '')}".strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mutation.jsonl"), help="results, one JSON a line")
    parser.add_argument("--count", type=int, default=300, help="the first so many of the sample (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="another sample (default 0, that of tests/README.md)")
    parser.add_argument("--list", metavar="FILE", help="only print the mistakes that a file offers")
    args = parser.parse_args()
    if args.list:
        print("\n".join(describe(m) for m in candidates(args.list)))
    else:
        main(args)
