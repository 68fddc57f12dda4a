"""What make.py and grade.py share: the assignments, the tree that they are set in, one function's body in a file."""

import ast
import shutil
import subprocess
import textwrap
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10: pytest brings tomli there
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# What a handout is made of: the graded tests and the scripts of the method, all that they import, and what there is to
# read of it; no weights, no results, nothing about the assignments
CODE = ("infer.py", "train_vae.py", "train_harmonize.py", "examples/chopgrad_diffusers.py", "tests/__init__.py",
        "tests/conftest.py")
TEXTS = ("README.md", "LICENSE", "CITATION.cff", "DEVIATIONS.md", "pyproject.toml", "requirements*.txt",
         "docs/walkthrough.md", "docs/walkthrough_*.png", "docs/equations.md", "docs/training.md", "docs/use.md")


def names() -> list[str]:
    """Every assignment, in the order of the method."""
    return sorted((path.stem for path in HERE.glob("*.toml")), key=lambda name: read(name)["order"])


def read(name: str) -> dict:
    """title, order, paper, hint, without (what a handout must not show), functions (name, points, tests, hint)."""
    known = {path.stem: path for path in HERE.glob("*.toml")}
    if name not in known:
        raise ValueError(f"there is no assignment {name!a}; there are {', '.join(sorted(known))}")
    return tomllib.loads(known[name].read_text(encoding="utf-8"))


def files(root: Path = ROOT) -> list[Path]:
    """The files of a handout, relative to the source tree; where there is git, those that it tracks."""
    functions = [f for name in names() for f in read(name)["functions"]]
    graded = {item.partition("::")[0] for f in functions for item in (f["name"], *f["tests"])}
    found, waiting = set(), {Path(file) for file in (*graded, *CODE) if (root / file).is_file()}
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= imported(root, file) - found
    found |= {path.relative_to(root) for pattern in TEXTS for path in root.glob(pattern) if path.is_file()}
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "-c", "safe.directory=*", "ls-files", "-z", "--cached"]
        tracked = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        found &= {Path(name) for name in tracked.split("\0") if name}
    return sorted(found)


def imported(root: Path, file: Path) -> set[Path]:
    """The files of the tree that a file imports, wherever the import is in it."""
    found = set()
    for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [Path(*alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1] if node.level else Path()
            package = start.joinpath(*(node.module or "").split("."))
            modules = [package, *(package / alias.name for alias in node.names)]
        else:
            continue
        found |= {module.with_suffix(".py") for module in modules if module.name}
    return {path for path in found if (root / path).is_file()}


def copy_tree(out: Path, assignments: list[dict]) -> None:
    """Write the tree without what quotes a solution: the files above, and what the assignments name under `without`."""
    for file in files():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, out / file)
    for item in (item for assignment in assignments for item in assignment.get("without", [])):
        file, _, name = item.partition("::")
        text = remove((out / file).read_text(encoding="utf-8"), name)
        (out / file).write_text(text, encoding="utf-8")


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The function or method of a dotted name; ValueError unless there is exactly one."""
    scope = [tree]
    for part in name.split("."):
        scope = [node for outer in scope for node in outer.body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part]
    if len(scope) != 1 or not isinstance(scope[0], ast.FunctionDef):
        raise ValueError(f"wanted one function {name}, found {len(scope)}")
    return scope[0]


def statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """Its body without the docstring."""
    return function.body[ast.get_docstring(function, clean=False) is not None:]


def splice(source: str, name: str, body: str) -> str:
    """The source with another body for one function; signature, decorators and docstring stay."""
    function = find(ast.parse(source), name)
    lines = source.splitlines(keepends=True)
    first = function.body[0]
    if ast.get_docstring(function) is None:
        raise ValueError(f"{name} has no docstring, which is the task")
    new = textwrap.indent(textwrap.dedent(body).strip("\n"), " " * first.col_offset) + "\n"
    return "".join([*lines[: first.end_lineno], new, *lines[function.end_lineno :]])


def remove(source: str, name: str) -> str:
    """The source without one top-level function or table."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if name in [getattr(node, "name", None), *(getattr(t, "id", None) for t in getattr(node, "targets", []))]:
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            return "".join(lines[:start]).rstrip("\n") + "\n\n\n" + "".join(lines[node.end_lineno :]).lstrip("\n")
    raise ValueError(f"nothing is called {name}")
