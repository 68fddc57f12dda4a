"""The assignments: our own bodies have full marks where submissions are graded, no other has, no handout shows them.

All bodies are tried in one process: `python -m tests.test_assignments [ASSIGNMENT ...]` shuts itself in as the grader
does and runs the graded tests once. Then it gives each function its wrong bodies one after the other and runs the
function's tests, the fastest first, until one fails.
"""

import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "assignments"))
import cage  # noqa: E402
import check  # noqa: E402
import make  # noqa: E402
import source  # noqa: E402

from tests.student_bodies import EMPTY, MISTAKES  # noqa: E402

FUNCTIONS = {f["name"]: (name, f) for name in source.names() for f in source.read(name)["functions"]}


class Swap:
    """A plugin of pytest that runs the tests with the true bodies and then with each wrong one.

    own: the failures of our own bodies, by test. outcomes: {function: [first failure of each wrong body, or None]}."""

    def __init__(self):
        self.failure, self.own, self.outcomes, self.seconds = None, {}, {}, {}

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and self.failure is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failure = crash.message if crash else str(report.longrepr)

    def run(self, items) -> str | None:
        """The first failure."""
        self.failure = None
        for item in items:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.failure is not None:
                break
        return self.failure

    def pytest_runtestloop(self, session):
        self.own = {item.nodeid: self.run([item]) for item in session.items}
        order = sorted(session.items, key=lambda item: self.seconds[item.nodeid])
        for bodies in (mistaken, empty):  # these last, for they spoil what tests share
            for name, (_, function) in FUNCTIONS.items():
                items = [i for i in order if any(i.nodeid == t or i.nodeid.startswith(f"{t}[")
                                                 for t in function["tests"])]
                target = inspect.unwrap(reduce(getattr, name.partition("::")[2].split("."), module_of(name)))
                right = target.__code__
                for text in bodies(name):
                    target.__code__ = code_of(text, name)
                    self.outcomes.setdefault(name, []).append(self.run(items))
                target.__code__ = right
        return True


def module_of(name: str):
    return import_module(name.partition("::")[0][:-3].replace("/", "."))


def mistaken(name: str) -> list[str]:
    """The function's file: blank, and with each of the function's mistakes in it."""
    file, _, dotted = name.partition("::")
    text = (source.ROOT / file).read_text(encoding="utf-8")
    function, wrong = source.find(ast.parse(text), dotted), [make.blank(text, file, dotted)]
    body = "\n".join(text.splitlines()[function.body[0].end_lineno : function.end_lineno])
    for old, new in MISTAKES[dotted]:
        assert old in body, f"{dotted} has no {old!r} any more:\n{body}"
        wrong.append(source.splice(text, dotted, body.replace(old, new)))
    return wrong


def empty(name: str) -> list[str]:
    """The function's file with each body that solves nothing."""
    file, _, dotted = name.partition("::")
    text = (source.ROOT / file).read_text(encoding="utf-8")
    names = sorted((a.arg for a in source.find(ast.parse(text), dotted).args.args), key=lambda name: name == "self")
    return [source.splice(text, dotted, body(names)) for body in EMPTY.values()]


def code_of(text: str, name: str):
    """The code object of a function in its file's text."""
    code = compile(text, name.partition("::")[0], "exec")
    for part in name.partition("::")[2].split("."):
        code = next(c for c in code.co_consts if inspect.iscode(c) and c.co_name == part)
    return code


@pytest.fixture(scope="module")
def tried() -> dict:
    """{own: {test: failure}, outcomes: {function: [failure]}}"""
    run = subprocess.run([sys.executable, "-B", "-m", "tests.test_assignments"], cwd=source.ROOT, capture_output=True,
                         text=True)
    assert "OUTCOMES" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(run.stdout.rpartition("OUTCOMES")[2])


def test_our_own_bodies_pass_where_submissions_are_graded(tried):
    assert not {test: failure for test, failure in tried["own"].items() if failure is not None}
    assert {t.partition("[")[0] for t in tried["own"]} == {
        t.partition("[")[0] for _, f in FUNCTIONS.values() for t in f["tests"]}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_blank_function_and_every_usual_mistake_fails_its_tests(name, tried):
    blank, *mistakes = tried["outcomes"][name][:-len(EMPTY)]
    assert blank is not None and f"NotImplementedError: {name}" in blank, f"blank, it fails with {blank}"
    planted = MISTAKES[name.partition("::")[2]]
    survivors = [pair for pair, failure in zip(planted, mistakes, strict=True) if failure is None]
    assert len(planted) >= 3 and not survivors, f"of {len(planted)} mistakes these pass: {survivors}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_body_that_solves_nothing_has_no_points_even_if_it_spoils_its_inputs(name, tried):
    failures = tried["outcomes"][name][-len(EMPTY):]
    assert not [what for what, failure in zip(EMPTY, failures, strict=True) if failure is None]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_short_and_its_docstring_is_the_task(name):
    file, _, dotted = name.partition("::")
    text = (source.ROOT / file).read_text(encoding="utf-8")
    function = source.find(ast.parse(text), dotted)
    body = text.splitlines()[function.body[0].end_lineno : function.end_lineno]
    lines = sum(not line.strip().startswith("#") for line in body)
    assert ast.get_docstring(function) and lines <= 25, f"{name} has {lines} lines, wanted a docstring and at most 25"
    body = source.statements(function)
    module, assignment = ast.parse(text), FUNCTIONS[name][0]
    graded = [n.partition("::")[2] for n, (a, _) in FUNCTIONS.items() if a == assignment and n.startswith(f"{file}::")]
    refusals = check.refusals(body, source.find(module, dotted), module, graded)
    assert not refusals, f"the grader would refuse our own: {refusals}"


def test_there_is_an_assignment_for_every_part_of_the_method_and_no_test_without_a_function():
    orders = [source.read(name)["order"] for name in source.names()]
    assert len(orders) >= 5 and orders == sorted(set(orders))
    assert set(MISTAKES) == {name.partition("::")[2] for name in FUNCTIONS}


@pytest.mark.parametrize("file", sorted({t.partition("::")[0] for _, f in FUNCTIONS.values() for t in f["tests"]}))
def test_graded_tests_need_no_diffusers(file):
    imported = {a.name.split(".")[0] for n in ast.parse((source.ROOT / file).read_text()).body
                if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.parse((source.ROOT / file).read_text()).body
                 if isinstance(n, ast.ImportFrom)}
    assert not imported & {"diffusers", "transformers", "peft", "torchvision", "lpips"}, f"{file}: {imported}"


@pytest.fixture(scope="module")
def handout(tmp_path_factory) -> Path:
    """One handout of all assignments."""
    out = tmp_path_factory.mktemp("handouts") / "all"
    make.make(source.names(), out)
    return out


def test_a_handout_raises_where_a_body_was_and_is_whole_elsewhere(handout):
    for name in FUNCTIONS:
        file, _, dotted = name.partition("::")
        ours, theirs = (source.find(ast.parse((root / file).read_text(encoding="utf-8")), dotted)
                        for root in (source.ROOT, handout))
        statement, = source.statements(theirs)
        assert ast.unparse(statement) == f"raise NotImplementedError('{name}')"
        ours.body, theirs.body = ours.body[:1], theirs.body[:1]
        assert ast.dump(ours) == ast.dump(theirs), f"{name}: decorators, signature or docstring changed"
    assert not {"assignments", ".git", "__pycache__", "weights"} & {p.name for p in handout.rglob("*")}
    assert sum(p.stat().st_size for p in handout.rglob("*") if p.is_file()) < 1.3e6, "code, graded tests, pages"
    for file in handout.rglob("*.py"):
        missing = source.imported(source.ROOT, file.relative_to(handout)) - set(source.files())
        assert not missing, f"{file.relative_to(handout)} imports {missing}, which the handout lacks"
    readme = (handout / "README.md").read_text(encoding="utf-8")
    assert "pytest -n 0 -x" in readme and all(f"`{name}`" in readme for name in FUNCTIONS)


def test_no_line_of_a_solution_is_left_in_a_handout(handout):
    left = "\n".join(p.read_text(encoding="utf-8", errors="ignore") for p in handout.rglob("*")
                     if p.suffix in (".py", ".md", ".toml", ".txt"))
    for name in FUNCTIONS:
        file, _, dotted = name.partition("::")
        text = (source.ROOT / file).read_text(encoding="utf-8")
        function = source.find(ast.parse(text), dotted)
        for line in text.splitlines()[function.body[0].end_lineno : function.end_lineno]:
            code = line.partition("  #")[0].strip()
            if len(code) > 40 and not code.startswith(("#", "raise ", "if ", "for ")):  # a spec in loops has its own
                assert code not in left, f"{name}: a handout shows {code!r}"


if __name__ == "__main__":
    tempfile.tempdir = os.environ["MPLCONFIGDIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(source.ROOT)
    protections = cage.available()
    cage.limit(3600)
    cage.enter([source.ROOT, *cage.python_folders([])], protections)
    FUNCTIONS = {name: f for name, f in FUNCTIONS.items() if f[0] in (sys.argv[1:] or source.names())}
    swap = Swap()
    ids = dict.fromkeys(t for _, f in FUNCTIONS.values() for t in f["tests"])
    quiet = ["-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:logging", "--capture=no", "--tb=line"]
    pytest.main([*quiet, *ids], plugins=[swap])
    sys.stdout.flush()
    print("OUTCOMES", json.dumps({"own": swap.own, "outcomes": swap.outcomes}))
