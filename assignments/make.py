"""Write the handout of one assignment or of several: this tree, with the bodies of their functions taken out.

    python assignments/make.py chopgrad --out handout
    python assignments/make.py causal_cache lora injection --out handout

A function keeps its decorators, its signature and its docstring, which is the task. A handout is about 1.25 MB;
source.py lists what goes in, of what git tracks. README.md becomes the student's; the project's own is PROJECT.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import source  # noqa: E402

README = """# {title}

{count} to write, {points} points. The docstring of each is the whole task: equation, shapes, ranges, what must hold.
All else is complete and there to be read, stepped through and called. Papers: {paper}. PROJECT.md is the README of
mirage_min, the project that this is from; docs/walkthrough.md tells the method from start to end. The trained weights
and the demo clip are not here.

## The first red test, in five minutes

```
python3 -m venv venv && . venv/bin/activate
pip install -r requirements-test.txt
pytest -n 0 -x "{first}"
```

It fails with `NotImplementedError("{first_function}")`. Open that file, read the docstring, write the body, run it
again. All graded tests: `pytest @graded.txt`. (-n 0: in one process, where pdb works.)

| function | points | tests |
|---|---|---|
{table}
{hints}
## How it is graded

Of your tree only the bodies of these functions count. Each is put alone into a clean copy of the project and has its
points when all of its tests pass there, on other random numbers than yours and within {limit} seconds of processor
time; a mistake in one costs nothing elsewhere. A body may use its arguments, what the original bodies use of their
file, plain Python, and torch's functions and methods over tensors. It may hold helper functions. It may not import,
define classes, open files, or call a function of the table that the original does not call. Whatever else you change
(tests, other functions, settings) is for you alone. Hand in the folder, without venv.
"""
HINT = "\n<details><summary>Hint: {name}</summary>\n\n{hint}\n\n</details>\n"


def blank(text: str, file: str, name: str) -> str:
    return source.splice(text, name, f'raise NotImplementedError("{file}::{name}")')


def readme(assignments: list[dict], limit: int = 120) -> str:
    functions = [f for a in assignments for f in a["functions"]]
    hints = [(a["title"], a["hint"]) for a in assignments] + [
        (f["name"].partition("::")[2], f["hint"]) for f in functions if "hint" in f]
    return README.format(
        title="; ".join(a["title"] for a in assignments), paper="; ".join(a["paper"] for a in assignments),
        count=f"{len(functions)} functions" if len(functions) > 1 else "One function",
        points=sum(f["points"] for f in functions), first=functions[0]["tests"][0],
        first_function=functions[0]["name"], limit=limit,
        table="\n".join(f"| `{f['name']}` | {f['points']} | {'<br>'.join(f'`{t}`' for t in f['tests'])} |"
                        for f in functions),
        hints="".join(HINT.format(name=name, hint=hint) for name, hint in hints))


def make(chosen: list[str], out: Path) -> None:
    """Write the handout to a folder that does not exist yet; whole or not at all."""
    if out.exists():
        raise ValueError(f"{out} exists")
    assignments = sorted(map(source.read, set(chosen)), key=lambda assignment: assignment["order"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".handout") as folder:
        tree = Path(folder) / "tree"
        source.copy_tree(tree, assignments)
        for assignment in assignments:
            for function in assignment["functions"]:
                file, _, name = function["name"].partition("::")
                text = blank((tree / file).read_text(encoding="utf-8"), file, name)
                (tree / file).write_text(text, encoding="utf-8")
        tests = dict.fromkeys(t for a in assignments for f in a["functions"] for t in f["tests"])
        (tree / "README.md").rename(tree / "PROJECT.md")
        (tree / "README.md").write_text(readme(assignments), encoding="utf-8")
        (tree / "graded.txt").write_text("\n".join(tests) + "\n", encoding="utf-8")
        (tree / "assignment.txt").write_text("\n".join(a for a in source.names() if a in chosen) + "\n")
        tree.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"of {', '.join(source.names())}")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist")
    args = parser.parse_args()
    try:
        make(args.names, args.out)
    except (ValueError, OSError) as error:
        print("make.py:", error, file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {', '.join(args.names)}")
