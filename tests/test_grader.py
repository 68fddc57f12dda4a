"""The grader: a body that solves nothing has no points, and one that gets past every check of names still does no harm.

Three lines of defence, each tested by itself: bodies are refused by what they name; what runs is shut in (tried with
plain Python, as if nothing had been refused); a report decides on its own function and prints no words of its own.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "assignments"))
import cage  # noqa: E402
import check  # noqa: E402
import grade  # noqa: E402
import source  # noqa: E402

ONE_STEP, LORA = "mirage_min/method/one_step.py", "mirage_min/method/lora.py"
PROTECTIONS = cage.available()
protected = pytest.mark.skipif(PROTECTIONS != cage.PROTECTIONS, reason="needs seccomp and landlock (Linux 5.13)")


def refusals(name: str, body: str) -> list[str]:
    """Of a body for one of the graded functions."""
    file, _, dotted = name.partition("::")
    module = ast.parse((source.ROOT / file).read_text(encoding="utf-8"))
    graded = [f["name"].partition("::")[2] for a in source.names() for f in source.read(a)["functions"]
              if f["name"].startswith(f"{file}::")]
    return check.refusals(ast.parse(body).body, source.find(module, dotted), module, graded)


BODIES = {  # what a body has no business with
    "an import": "import os\nos._exit(0)",
    "torch's own modules": "torch.os._exit(0)",
    "another road to sys": "torch.sys.modules",
    "a file": 'open("tests/test_causal_conv.py", "w").write("")',
    "code from text": 'exec("import os")',
    "private roads": "x.__class__.__init__.__globals__",
    "a private name": "__builtins__",
    "a loader": "__loader__.get_data('/etc/passwd')",
    "getattr": 'getattr(torch, "os")._exit(0)',
    "a pattern": "match torch:\n    case object(os=o):\n        o._exit(0)",
    "torch's equality": "torch.equal = lambda a, b: True",
    "a tensor's methods": "Tensor.max = lambda self: self",
    "a tensor's methods, deleted": "del torch.Tensor.max",
    "a liar": "class Liar:\n    pass\nreturn Liar()",
    "a global": "global CausalConv3d",
    "a pickle": 'torch.load("x", weights_only=False)',
    "a picture": 'torch.save(x, "/x")',
    "a mapped file": 'torch.from_file("/etc/passwd", True, 10, dtype=torch.uint8)',
    "TorchScript": 'torch.CompilationUnit("def add(n: int):\\n return torch.from_file(\'x\', True, n)").add(3)',
    "TorchScript by its name": 'torch.jit.script(x)',
    "a parser of graphs": 'torch.parse_ir("graph(): return ()")',
    "an imported module": 'torch.import_ir_module(x, "/x")',
    "a zip": 'torch.PyTorchFileWriter("/victim")',
    "a zip, read": 'torch.PyTorchFileReader("/victim")',
    "torch's processes": "torch.multiprocessing.Process()",
    "a fork of TorchScript": "torch.fork(x)",
    "operators by name": "torch.ops.aten.from_file('/etc/passwd')",
    "storages": "x.untyped_storage().from_file('/etc/passwd', True, 10)",
    "shared memory": "x.share_memory_()",
    "another memory": "x.set_(x)",
    "numpy's files": 'x.numpy().tofile("/x")',
    "the seed": "torch.manual_seed(0)",
    "the seed's state": "torch.get_rng_state()",
    "frames by format": '"{0.__traceback__.tb_frame.f_back}".format(x)',
    "frames by format_map": '"{x.__class__}".format_map({"x": x})',
    "frames": "x.gi_frame.f_back.f_globals",
    "a frame of an error": "try:\n    pass\nexcept ValueError as e:\n    e.__traceback__.tb_frame",
    "local elsewhere, a builtin here": "def f():\n    open = 1\nopen('x', 'w')",
    "local in a comprehension": "[open for open in []]\nopen('x', 'w')",
    "an argument of a lambda": "f = lambda exec: 0\nexec('1')",
    "an annotation": "y: open('x', 'w') = 1",
    "a default": "def f(a=open('x', 'w')):\n    pass",
    "a decorator": "@exec\ndef f():\n    pass",
    "wide letters": "ｏｐｅｎ('x', 'w')",
    "tests by name": "tests.small",
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_reaches_beyond_its_function_is_not_run(what):
    for name in (f"{LORA}::LoRA.delta", "mirage_min/networks/causal_conv.py::CausalConv3d.with_past"):
        told = refusals(name, BODIES[what])
        assert told and all("not available" in r or "not for these" in r or "must not be set" in r for r in told), told


@pytest.mark.parametrize("name, body", [
    (f"{ONE_STEP}::v_target", "return z0_from_v(eps, z0, alpha_bar_t)"),
    (f"{ONE_STEP}::z0_from_v", "return v_target(v, z_t, alpha_bar_t)"),
    (f"{ONE_STEP}::add_noise", "return v_target(-eps, z0, alpha_bar_t)"),
    (f"{ONE_STEP}::add_noise", "def f():\n    v_target = 1\nreturn v_target(-eps, z0, alpha_bar_t)"),
    (f"{ONE_STEP}::z0_from_flow", "return denoise(lambda *_: v, z_t, None, 0)"),
    (f"{LORA}::LoRA.delta", "return merge(self, 'a')"),
    ("mirage_min/method/chopgrad.py::backpropagate_tile", "return algorithm_1(clip, tile, loss_fn)"),
    ("mirage_min/method/optical_flow.py::warp", "return warp_error(x, flow)"),
])
def test_a_body_does_not_call_a_graded_function_that_the_original_does_not_call(name, body):
    assert any("not available" in told for told in refusals(name, body))


def test_names_of_the_file_that_no_graded_body_uses_are_not_available():
    for name, body in (("mirage_min/method/perceptual.py::gram", "save_tensors('/any/path', {})"),
                       ("mirage_min/method/perceptual.py::gram", "Path('a').replace('b')"),
                       (f"{LORA}::merge", "json.loads('{}')")):
        assert any("not available" in told for told in refusals(name, body))


def test_other_ways_to_write_a_body_are_taken():
    assert not refusals(f"{ONE_STEP}::v_target", "a = alpha_bar_t.sqrt().view(-1, *[1] * (z0.ndim - 1))\n"
                        "helper = lambda x: torch.sqrt(1 - x ** 2)\nreturn a.double() * eps - helper(a) * z0")
    assert not refusals("mirage_min/method/metrics.py::psnr", '''
if x.shape != y.shape:
    raise ValueError(f"wanted {tuple(x.shape)}, got {list(y.shape)!r:>9}")
def decibels(errors):
    with torch.no_grad():
        return [10 * torch.log10(4 / e).item() if e > 0 else float("inf") for e in errors.unbind(0)]
total = {k: v for k, v in enumerate(decibels((x - y).pow(2).mean(dim=(1, 2, 3, 4))))}
return torch.tensor(sorted(total.values(), reverse=True), dtype=torch.float64)''')


def submit(folder: Path, name: str, body: str) -> Path:
    """A folder with one file, in which this function has this body."""
    file, _, dotted = name.partition("::")
    (folder / file).parent.mkdir(parents=True)
    text = source.splice((source.ROOT / file).read_text(encoding="utf-8"), dotted, body)
    (folder / file).write_text(text, encoding="utf-8")
    return folder


def test_of_a_submission_only_the_bodies_are_taken(tmp_path):
    name = "mirage_min/networks/causal_conv.py::CausalConv3d.with_past"
    file = submit(tmp_path, name, "pass") / "mirage_min/networks/causal_conv.py"
    wanted = source.splice((source.ROOT / "mirage_min/networks/causal_conv.py").read_text(), "CausalConv3d.with_past",
                           "return torch.cat([x, x])")
    file.write_text("import os\nos._exit(0)\n\nclass CausalConv3d:\n    @os.abort\n"
                    "    def with_past(self, x=os.abort()):\n        return torch.cat([x, x])\n")
    assert grade.graft(tmp_path, name, [name]) == wanted
    for broken, message in (("def with_past(:", "cannot be parsed"), ("x = 1", "wanted one function"),
                            ("x = \0", "null"), ("#" * 2**19, "above"), ("(" * 100_000, "cannot be parsed")):
        file.write_text(broken)
        with pytest.raises(ValueError, match=message):
            grade.graft(tmp_path, name, [name])


@pytest.mark.parametrize("linked", ["mirage_min/method/lora.py", "mirage_min/method", "mirage_min"])
def test_a_submission_that_links_to_our_source_holds_nothing(linked, tmp_path):
    (tmp_path / linked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / linked).symlink_to(source.ROOT / linked)
    with pytest.raises(ValueError, match="no file"):
        grade.graft(tmp_path, f"{LORA}::merge", [f"{LORA}::merge"])


def test_an_assignment_is_named_not_a_path(tmp_path):
    (tmp_path / "evil.toml").write_text('functions = []')
    for name in ("../evil", str(tmp_path / "evil"), "lora.toml", "\x1b[2Jlora"):
        with pytest.raises(ValueError, match="there is no assignment") as error:
            source.read(name)
        assert str(error.value).isprintable()


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """A folder that a submission has no business with: secret.txt in it says 'mine'."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.txt").write_text("mine")
    return folder


ATTACKS = '''
import ctypes, multiprocessing, os, resource, signal, socket, subprocess, threading
from pathlib import Path
import pytest, torch

ROOT, OUTSIDE, GRADER = Path(%r), Path(%r), %d
refused = pytest.raises((OSError, RuntimeError))

@pytest.mark.parametrize("path", [
    ROOT / "mirage_min/method/lora.py", ROOT / "assignments/grade.py", ROOT / "README.md", OUTSIDE / "secret.txt",
    Path("/etc/passwd"), Path(f"/proc/{GRADER}/environ"), Path(f"/proc/{GRADER}/mem"), Path(f"/proc/{GRADER}/root"),
    Path(f"/proc/self/root{ROOT}/README.md"), Path(f"/proc/self/cwd/../{OUTSIDE}/secret.txt")])
def test_reading(path):
    for read in (Path.read_bytes, os.listdir, lambda p: os.open(p, os.O_RDONLY),
                 lambda p: torch.from_file(str(p), False, 2, dtype=torch.uint8)):
        with refused:
            read(path)

@pytest.mark.parametrize("folder", [Path.cwd(), Path.cwd() / "tests", OUTSIDE, Path("/tmp"), Path("/dev/shm"), ROOT])
def test_writing(folder):
    new = folder / f"new-{GRADER}"  # a name that nobody else has
    own = Path.cwd() / "test_attacks.py"
    for write in (lambda p: p.write_text(""), lambda p: os.open(p, os.O_CREAT), lambda p: own.rename(p),
                  lambda p: torch.save(torch.ones(1), p), lambda p: p.mkdir(), lambda p: p.symlink_to(own),
                  lambda p: p.hardlink_to(own), lambda p: os.mkfifo(p),
                  lambda p: torch.from_file(str(p), True, 2, dtype=torch.uint8)):
        with refused:
            write(new)
    assert not new.exists()

@pytest.mark.parametrize("path", [Path("test_attacks.py"), OUTSIDE / "secret.txt", ROOT / "README.md"])
def test_changing(path):
    for change in (lambda p: open(p, "a"), lambda p: open(p, "r+"), lambda p: os.truncate(p, 0), Path.unlink,
                   lambda p: p.chmod(0o777), lambda p: os.chown(p, 1, 1), os.utime,
                   lambda p: os.setxattr(p, "user.x", b""), lambda p: os.rename(p, "x")):
        with refused:
            change(path)

def test_starting():
    for start in (os.fork, lambda: subprocess.run(["true"]), lambda: os.execv("/bin/true", ["true"]),
                  lambda: os.posix_spawn("/bin/true", ["true"], {}), lambda: os.forkpty(),
                  multiprocessing.Process(target=print).start):
        with refused:
            start()
    libc = ctypes.CDLL(None, use_errno=True)
    assert os.system("true") != 0
    assert [libc.syscall(n, 17, 0, 0, 0, 0) for n in %s] == [-1] * 3      # clone, clone3, vfork by their numbers
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()

def test_reaching_others():
    for reach in (lambda: os.kill(GRADER, 0), lambda: os.kill(-1, 0), lambda: os.killpg(os.getpgid(GRADER), 0),
                  lambda: os.pidfd_open(GRADER), lambda: os.setpriority(os.PRIO_PROCESS, GRADER, 5),
                  lambda: resource.prlimit(GRADER, resource.RLIMIT_CPU, (1, 1)),
                  lambda: os.sched_setaffinity(GRADER, {0}), lambda: os.setuid(0) or os.chroot(".")):
        with refused:
            reach()
    os.kill(os.getpid(), 0)

@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_calling_home(family):
    with refused:
        socket.socket(family, socket.SOCK_STREAM)
    with refused:
        socket.socketpair()
'''


@pytest.fixture
def attacks(tmp_path, outside) -> Path:
    numbers = {"x86_64": (56, 435, 58), "aarch64": (220, 435, 435)}[os.uname().machine]
    (tmp_path / "test_attacks.py").write_text(ATTACKS % (str(source.ROOT), str(outside), os.getpid(), numbers))
    return tmp_path


@protected
def test_what_runs_reads_writes_starts_signals_and_calls_nothing(attacks, outside):
    tests = [f"test_attacks.py::test_{what}" for what in
             ("reading", "writing", "changing", "starting", "reaching_others", "calling_home")]
    (attacks / "tests").mkdir()
    assert grade.run_tests(attacks, tests, 1, 300, PROTECTIONS) == (True, "", "")
    assert (outside / "secret.txt").read_text() == "mine" and len(list(outside.iterdir())) == 1
    passed, reason, _ = grade.run_tests(attacks, tests[:1], 1, 300)  # without protection the same test tells
    assert not passed and reason == "test_attacks.py::test_reading: Failed"


def test_exiting_looping_and_lying_yield_nothing(tmp_path):
    (tmp_path / "test_it.py").write_text('''
import os, sys
def test_loop():
    while True: pass
def test_report():
    print("1 passed")
    os.write(int(sys.argv[1]), b'{"nonce": "", "status": 0, "outcomes": {"test_it.py::test_report": "passed"}}')
    os._exit(0)
''')
    got = {name: grade.run_tests(tmp_path, [f"test_it.py::test_{name}"], 1, limit, PROTECTIONS)
           for name, limit in (("report", 300), ("loop", 2))}
    assert not any(passed for passed, _, _ in got.values()), got
    assert "2 seconds of processor time" in got["loop"][1] and "without a report" in got["report"][1], got


def report(**changed) -> str:
    good = {"nonce": "n", "outcomes": {"t.py::a[1]": "passed", "t.py::a[2]": "passed"}, "error": "", "message": ""}
    return json.dumps(good | changed)


def test_a_report_counts_with_its_nonce_and_if_every_test_has_passed():
    assert grade.verdict(report(), 0, "n", ["t.py::a"]) == (True, "", "")
    assert grade.verdict(report(outcomes={"t.py::a[1]": "passed", "t.py::a[2]": "failed"}, error="KeyError",
                                message="its text"), 0, "n", ["t.py::a"]) == (False, "t.py::a: KeyError", "its text")
    outcomes = {"t.py::a[1]": "not run", "t.py::b": "failed", "t.py::c": "not run"}
    assert grade.verdict(report(outcomes=outcomes, error="spam"), 0, "n", ["t.py::a", "t.py::b", "t.py::c"]) == (
        False, "t.py::b: an error", "")
    for told, status, tests in (
            (report(), 1, ["t.py::a"]), (report(nonce="m"), 0, ["t.py::a"]), (report(), 0, ["t.py::a", "t.py::b"]),
            (report(outcomes={}), 0, ["t.py::a"]), (report(outcomes={"t.py::a[1]": "skipped"}), 0, ["t.py::a"]),
            (report(outcomes={"t.py::a[1]": "not run"}), 0, ["t.py::a"]), (report(outcomes=[]), 0, ["t.py::a"]),
            (report(outcomes={"t.py::a[1]": ["passed"]}), 0, ["t.py::a"]), ("", 0, ["t.py::a"]),
            ("[]", 0, ["t.py::a"]), ("7", 0, ["t.py::a"]), ("[" * 100_000, 0, ["t.py::a"]),
            ('{"nonce": "n"}', 0, ["t.py::a"])):
        passed, reason, _ = grade.verdict(told, status, "n", tests)
        assert not passed and reason, told


def test_a_forged_line_and_a_leaked_file_are_not_printed(tmp_path, monkeypatch, capsys):
    """The process says what it likes: a kind of error, a message, the names of tests."""
    forged = "\x1b[2J\n  8 of   8  forged line \u202e"
    (tmp_path / "assignment.txt").write_text("lora")
    submit(tmp_path, f"{LORA}::LoRA.delta", "pass")
    monkeypatch.setattr(grade.cage, "available", lambda: cage.PROTECTIONS)
    monkeypatch.setattr(grade, "run_tests", lambda tree, tests, *_: grade.verdict(
        report(outcomes={tests[0]: forged, forged: "passed"}, error=forged, message=forged), 0, "n", tests))
    args = {"submission": tmp_path, "assignment": None, "seed": 1, "limit": 9, "json": tmp_path / "grades.json"}
    lora = source.read("lora")["functions"]
    for messages in (False, True):
        grade.main(grade.argparse.Namespace(**args, messages=messages))
        told = capsys.readouterr().out
        assert len(told.splitlines()) == len(lora) + 1
        assert all(line.isprintable() and line.isascii() for line in told.splitlines())
        assert ("forged" in told) == messages and f"0 of {sum(f['points'] for f in lora):3}  lora" in told
        assert all(row["message"] == "" or messages for a in json.loads(args["json"].read_text())["assignments"]
                   for row in a["functions"])


def test_every_function_has_a_fresh_tree_without_its_own_solution(tmp_path, monkeypatch):
    """What the tests of one function do to their tree is not seen by the next."""
    names = [f["name"] for f in source.read("lora")["functions"]]
    submit(tmp_path, names[0], "return 0")
    trees = []

    def vandal(tree, *_):
        texts = {p.relative_to(tree): p.read_text() for p in tree.rglob("*.py")}
        trees.append(texts)
        shutil.rmtree(tree / "tests")
        (tree / LORA).write_text("")
        return True, "", ""

    monkeypatch.setattr(grade, "run_tests", vandal)
    rows = grade.grade(tmp_path, "lora", 1)["functions"]
    assert all(row["points"] for row in rows), rows
    ours = (source.ROOT / LORA).read_text()
    assert len(trees) == len(names) and all(t.keys() == trees[0].keys() for t in trees)
    assert trees[0][Path(LORA)] == source.splice(ours, "LoRA.delta", "return 0") and trees[1][Path(LORA)] != ours
    assert all(text == (source.ROOT / file).read_text() for t in trees for file, text in t.items()
               if file != Path(LORA))
    assert not any("assignments" in file.parts or file.name == "student_bodies.py" for file in trees[0])


def test_a_submission_is_graded_from_the_command_line(tmp_path):
    """Ours has its points, a blank one none, an unknown one exit status 2; the same is in the gradebook."""
    submit(tmp_path, "mirage_min/networks/causal_conv.py::name_caches", "return {}")
    (tmp_path / "assignment.txt").write_text("causal_cache\n")
    command = [sys.executable, str(source.HERE / "grade.py"), str(tmp_path), "--json", str(tmp_path / "grades.json")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grades, = json.loads((tmp_path / "grades.json").read_text())["assignments"]
    assert [row["points"] for row in grades["functions"]] == [8, 0] and grades["points"] == 8 and grades["of"] == 10
    assert grades["protections"] == list(PROTECTIONS)
    assert "  8 of   8" in run.stdout and "test_names_are_the_dotted_names_of_the_layers: " in run.stdout
    command[1:1] = ["-OO"]  # without docstrings
    run = subprocess.run([*command, "--assignment", "../evil"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("grade.py: there is no assignment"), run.stderr
    command[2:] = [str(source.HERE / "make.py"), "../evil", "--out", str(tmp_path / "handout")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("make.py: there is no assignment"), run.stderr
    assert not (tmp_path / "handout").exists()


@pytest.mark.parametrize("machine", cage.MACHINES)
def test_the_filter_lets_each_machines_calls_through_or_not(machine):
    """By a reading of its lines in Python: what one machine numbers is tried for both."""
    column, name = cage.MACHINES[machine]
    lines, mine = cage.program(machine, 77), column

    def call(number: int, *arguments: int, machine: int = name) -> str:
        data, at, value = {0: number, 4: machine} | {16 + 8 * k: a for k, a in enumerate(arguments)}, 0, 0
        while True:
            code, yes, no, operand = lines[at]
            if code == cage.RETURN:
                return {cage.ALLOW: "allowed", cage.KILL: "killed", cage.ERROR | 1: "EPERM",
                        cage.ERROR | 38: "ENOSYS"}[operand]
            if code == cage.LOAD:
                value, at = data[operand], at + 1
            else:
                true = {cage.EQUAL: value == operand, cage.AT_LEAST: value >= operand,
                        cage.ANY_BIT: bool(value & operand)}[code]
                at += 1 + (yes if true else no)

    numbers = {"read": (0, 63), "openat": (257, 56), "clone": (56, 220), "execve": (59, 221), "socket": (41, 198),
               "kill": (62, 129), "tgkill": (234, 131), "unlinkat": (263, 35), "prlimit64": (302, 261)}
    of = {what: pair[mine] for what, pair in numbers.items()}
    assert call(of["read"], 3, 0, 1) == "allowed" and call(of["openat"], 3, 0, os.O_RDONLY | os.O_CLOEXEC) == "allowed"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
        assert call(of["openat"], 3, 0, flags) == "EPERM"
    assert call(of["clone"], 0x3D0F00) == "allowed" and call(of["clone"], 17) == "EPERM"  # a thread, a process
    assert [call(of[what], 9, 9, 9) for what in ("execve", "socket", "unlinkat")] == ["EPERM"] * 3
    for what in ("kill", "tgkill"):
        assert call(of[what], 77, 9) == "allowed" and call(of[what], 1, 9) == "EPERM"
    assert call(of["prlimit64"], 0) == "allowed" and call(of["prlimit64"], 1) == "EPERM"
    assert call(435, 0) == call(437, 0) == call(425, 0) == call(10**6, 0) == "ENOSYS"  # clone3, openat2, io_uring, new
    assert call(0x40000000 | of["execve"], 0) == "ENOSYS" and call(of["read"], 3, machine=3) == "killed"


def test_a_folder_is_read_around_what_is_hidden(tmp_path):
    for name in ("python/bin", "python/src/project/venv", "python/src/other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "python/src/link").symlink_to(tmp_path / "python/src/project")
    folder, hidden = tmp_path / "python", tmp_path / "python/src/project"
    assert cage.around(folder, [tmp_path / "elsewhere"]) == [folder]
    assert sorted(cage.around(folder, [hidden])) == [folder / "bin", folder / "src/other"]
    assert cage.around(hidden, [hidden]) == [] and cage.around(hidden / "venv", [hidden]) == [hidden / "venv"]


def test_where_nothing_protects_the_grader_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "assignment.txt").write_text("lora")
    monkeypatch.setattr(grade.cage, "available", lambda: ("seccomp",))
    monkeypatch.setattr(grade, "grade", lambda submission, name, seed, limit, protections: {
        "points": 0, "of": 11, "functions": [], "protections": protections})
    args = {"submission": tmp_path, "assignment": None, "seed": 1, "limit": 9, "json": None, "messages": False}
    grade.main(grade.argparse.Namespace(**args))
    assert "no landlock here" in capsys.readouterr().err


def test_a_handout_holds_tracked_files_and_none_of_an_earlier_one(tmp_path):
    for file in ("mirage_min/method/lora.py", "tests/test_lora.py", "tests/test_assignments.py", "infer.py",
                 "README.md", "weights/stage_a.safetensors", "docs/walkthrough.md", "assignments/grade.py",
                 "handout/mirage_min/method/lora.py", "handout/assignment.txt", "handout/infer.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    wanted = {Path(file) for file in ("mirage_min/method/lora.py", "tests/test_lora.py", "infer.py", "README.md",
                                      "docs/walkthrough.md")}
    assert set(source.files(tmp_path)) == wanted
    for command in (["init", "-q"], ["add", "-f", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "mirage_min/solutions.py").write_text("mine, and not tracked")
    assert set(source.files(tmp_path)) == wanted
