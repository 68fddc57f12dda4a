"""What make.py and grade.py share: the assignments, and one function's body in a source file."""

import ast
import subprocess
import textwrap
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10: pytest brings tomli there
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SKIPPED = {".git", ".venv", "venv", "runs", "data", "__pycache__", ".pytest_cache", ".ruff_cache"}


def names() -> list[str]:
    """Every assignment, in the order of the method."""
    return sorted((path.stem for path in HERE.glob("*.toml")), key=lambda name: read(name)["order"])


def read(name: str) -> dict:
    """title, order, paper, hint, without (what a handout must not show), functions (name, points, tests, hint)."""
    path = HERE / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"there is no assignment {name!r}; there are {', '.join(names())}")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def files(root: Path = ROOT) -> list[Path]:
    """The files of a source tree, relative to it: what git knows or does not ignore; without git, all but caches."""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        listed = [Path(name) for name in output.split("\0") if name]
    else:
        listed = [p.relative_to(root) for p in root.rglob("*") if not SKIPPED & set(p.relative_to(root).parts)]
    return sorted({p for p in listed if p.suffix != ".pyc" and (root / p).is_file()})


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
    function, lines = find(ast.parse(source), name), source.splitlines(keepends=True)
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
