"""The house: five folders, and a folder imports only what stands to its left in the chain."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # networks < method, data < training < systems < scripts; data may read the method, not the other way
    "networks": {"networks"},
    "method": {"networks", "method"},
    "data": {"networks", "method", "data"},
    "training": {"networks", "method", "data", "training"},
    "systems": {"networks", "method", "data", "training", "systems"},
}
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "mirage_min").rglob("*.py") if path.stem != "__init__")


def imported_folders(module: Path) -> set[str]:
    """The folders that a module of the package imports from, wherever the import stands, `__main__` excepted."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    body = [node for node in tree.body
            if not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")]
    found = set()
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found.add(module.parts[1])
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mirage_min":
            found.add((node.module + ".").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mirage_min.")}
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_only_from_folders_to_its_left(module):
    assert len(module.parts) == 3 and module.parts[1] in MAY_IMPORT, f"{module} stands in none of the five folders"
    wrong = imported_folders(module) - MAY_IMPORT[module.parts[1]]
    assert not wrong, f"{module} imports from {sorted(wrong)}, which stands to its right"


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_scripts_do_not_import_each_other(script):
    scripts = {path.stem for path in ROOT.glob("*.py")}
    imports = [node for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8")))
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.split(".")[0] for node in imports
             for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    assert not names & scripts, f"{script} imports {sorted(names & scripts)}"


def test_the_package_does_not_import_experiments_or_tests():
    for module in MODULES:
        text = (ROOT / module).read_text(encoding="utf-8")
        for outside in ("experiments", "tests", "assignments"):
            assert f"from {outside}" not in text and f"import {outside}" not in text, f"{module} imports {outside}"
