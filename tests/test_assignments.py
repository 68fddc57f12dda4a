"""The assignments: no handout shows a solution, every planted mistake fails, and the grader cannot be talked round.

The mistakes are tried in one process: `python -m tests.test_assignments [ASSIGNMENT ...]` collects the graded tests
once, then gives each function its wrong bodies one after the other and runs the function's tests until the first fails.
"""

import ast
import inspect
import json
import subprocess
import sys
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "assignments"))
import grade  # noqa: E402
import make  # noqa: E402
import source  # noqa: E402

FUNCTIONS = {f["name"]: (name, f) for name in source.names() for f in source.read(name)["functions"]}

# Mistakes that students make: {function: [(text of the body, what stands there instead)]}
MISTAKES = {
    "CausalConv3d.with_past": [
        ("past = self.kernel_size[0] - 1", "past = self.kernel_size[0]"),           # cache off by one
        ("x[:, :, -past:].clone()", "x[:, :, :past].clone()"),                     # the first frames kept, not the last
        ("x[:, :, -past:].clone()", "x[:, :, -past:]"),                             # the whole group stays alive
        ("[*before, x]", "[x, *before]"),                                           # padded on the right
        ("dim=2)", "dim=3)"),                                                       # axes swapped
        ("if old:", "if False:"),                                                   # the past forgotten
        ('self.first == "repeat"', 'self.first == "zeros"'),
    ],
    "name_caches": [
        ("layer.key = name", 'layer.key = name.split(".")[-1]'),
        ("module.named_modules()", "module.named_children()"),
        ("layer.key = name", "layer.key = type(layer).__name__"),
    ],
    "LoRA.delta": [
        ("self.scale *", ""),                                                       # alpha / r forgotten
        ("self.scale *", "self.alpha *"),                                           # r forgotten
        ("self.scale *", "self.A.shape[0] / self.alpha *"),                         # upside down
        ("self.B.flatten(1) @ self.A.flatten(1)", "(self.B.flatten(1) @ self.A.flatten(1)).flip(1)"),
    ],
    "_forward": [
        ("lora.scale *", ""),
        ("y = y + lora.scale", "y = lora.scale"),                                   # W x forgotten
        ("W = layer.weight + sum", "W = layer.weight - sum"),
        ("layer._conv_forward(x, W, layer.bias)", "layer._conv_forward(x, W, None)"),
    ],
    "merge": [
        ("+= lora.delta()", "-= lora.delta()"),
        ("+= lora.delta()", "= lora.delta()"),
        ("del layer.lora, layer.forward", "pass"),
    ],
    "CrossModalFusionBlock.forward": [
        ("h + s_h * rearrange", "s_h * rearrange"),                                 # the residual forgotten
        ("h + s_h * rearrange", "h + rearrange"),                                   # the scale forgotten
        ('"b c t h w -> (b t) c h w")', '"b c t h w -> (t b) c h w")'),             # axes swapped
        ("[h / s_h, f.to(h.dtype) / s_f]", "[f.to(h.dtype) / s_f, h / s_h]"),
        ("f.to(h.dtype) / s_f]", "f.to(h.dtype) / s_h]"),
    ],
    "measure_scales": [
        ("h.float().std()", "h.float().var()"),
        ("f.float().std()", "f.float().abs().mean()"),
        ("h, f = args", "f, h = args"),
        ("block.s_h.fill_(h.", "block.s_h.fill_(f."),
    ],
    "alpha_bar": [
        ("torch.cumprod(1 - betas, dim=0)", "1 - betas"),
        ("STEPS, dtype=torch.float64) ** 2", "STEPS, dtype=torch.float64)"),        # betas not squared
        ("* root[0] / (root[0] - root[-1])", ""),                                   # moved, not stretched
        ("(root - root[-1])", "root"),
    ],
    "add_noise": [
        ("a * z0 + b * eps", "b * z0 + a * eps"),
        ("a * z0 + b * eps", "a * z0 - b * eps"),
        ("a, b = _weights(alpha_bar_t, z0)", "a, b = _weights(alpha_bar_t ** 2, z0)"),
    ],
    "v_target": [
        ("a * eps - b * z0", "b * eps - a * z0"),
        ("a * eps - b * z0", "a * eps + b * z0"),
        ("a * eps - b * z0", "eps - z0"),                                           # a flow's
    ],
    "z0_from_v": [
        ("a * z_t - b * v", "b * z_t - a * v"),
        ("a * z_t - b * v", "a * z_t + b * v"),
        ("a * z_t - b * v", "(z_t - b * v) / a"),                                   # a network that predicts ε
        ("a * z_t - b * v", "a.to(z_t.dtype) * z_t - b.to(z_t.dtype) * v"),         # bfloat16 weights
    ],
    "z0_from_epsilon": [
        ("(z_t - b * eps) / a", "z_t - b * eps"),                                       # not divided
        ("(z_t - b * eps) / a", "(z_t + b * eps) / a"),
        ("(z_t - b * eps) / a", "a * z_t - b * eps"),                                   # a network that predicts v
        ("(z_t - b * eps) / a", "(z_t - b.to(z_t.dtype) * eps) / a.to(z_t.dtype)"),     # bfloat16 weights
    ],
    "z0_from_flow": [
        ("z_t - _column(sigma, z_t) * v", "z_t + _column(sigma, z_t) * v"),
        ("z_t - _column(sigma, z_t) * v", "z_t - (1 - _column(sigma, z_t)) * v"),
        ("z_t - _column(sigma, z_t) * v", "z_t - sigma.mean() * v"),
    ],
    "denoise": [
        ("z0_from_flow(z_t, prediction, 1.0)", "prediction"),
        ("z0_from_flow(z_t, prediction, 1.0)", "z0_from_flow(z_t, prediction, 0.2)"),
        ("dit(z_t, t, text)", "dit(add_noise(z_t, torch.randn_like(z_t), 0.74), t, text)"),
        ("alpha_bar[torch.as_tensor(t, device=alpha_bar.device)]", "alpha_bar[0]"),
    ],
    "denoise_edm": [
        ("sigma / (1 + sigma)", "sigma"),
        ("((1 - _column(t, z)) * z)", "z"),                                             # the input not shrunk
        ("z0_from_flow(z_t,", "z0_from_flow(z,"),
        ("dit(z_t, t, text)", "dit(z_t, 1000 * t, text)"),
    ],
    "algorithm_1": [
        ("c.detach().requires_grad_(c.requires_grad)", "c.detach()"),                   # never reaches back
        ("c.detach().requires_grad_(c.requires_grad)", "c"),                            # never cut
        ("min(d_trunc, i - 1) + 1", "min(d_trunc, i - 1)"),                             # one group too few
        ("min(d_trunc, i - 1) + 1", "min(d_trunc + 1, i - 1) + 1"),                     # one too many
        ("take_gradients(entered[i - k + 1])", "take_gradients(entered[i - k])"),
        ("take_gradients(entered[i - k + 1])",                                          # pushed again by later losses
         "{key: c.grad for key, c in entered[i - k + 1].items() if c.grad is not None}"),
        ("left[i - k][key]", "left[i - k + 1][key]"),
        ("loss_i.backward(retain_graph=True)", "loss_i.backward()"),
        ("if i > d_trunc:", "if False:"),                                               # graphs are never released
        ("t += x_i.shape[2]", "t += 4"),                                                # the first group has one frame
        ("[z_i.grad for z_i in latents]", "[z_i for z_i in latents]"),
    ],
    "backpropagate_tile": [
        ("c.detach().requires_grad_(c.requires_grad and d_trunc > 0)", "c.detach()"),   # never reaches back
        ("c.detach().requires_grad_(c.requires_grad and d_trunc > 0)", "c"),            # never cut
        ("window[-1].x.detach()", "window[0].x.detach()"),
        ("reach = d_trunc if", "reach = max(d_trunc - 1, 0) if"),                       # one group too early
        ("reach = d_trunc if", "reach = d_trunc + 1 if"),                               # one group too late
        ("t += x.shape[2]", "t += 4"),                                                  # the first group has one frame
        ("or not delayed", ""),
    ],
    "push_back": [
        ("take_gradients(graph.cache_in)", "{key: c.grad for key, c in graph.cache_in.items() if c.grad is not None}"),
        ("enumerate(reversed(window))", "enumerate(window)"),                           # oldest first
        ("retain_graph=k < reach", "retain_graph=k + 1 < reach"),
        ("graph.x = graph.grad_x = None", "pass"),
        ("roots = [(graph.cache_out[key], grad) for key, grad in grad_cache.items()]", "roots = []"),
    ],
    "take_leaf": [
        (".add_(leaf.grad)", ".copy_(leaf.grad)"),
        ("leaf.grad = None", "pass"),
        ("[:, :, time], tile, s)", "[:, :, time], tile, 1)"),
        ("whole[:, :, time]", "whole[:, time]"),                                        # axes swapped
    ],
    "cut_side": [
        ("n * k // pieces", "k * (n // pieces)"),                                       # the remainder lost
        ("range(pieces + 1)", "range(pieces)"),
        ("max(a - margin, 0)", "a"),
    ],
    "without_margin": [
        ("origin=side.seen.start", "origin=0"),
        ("slice(t, t + x.shape[2])", "slice(0, x.shape[2])"),
        ("*(scale(side.own, s) for side in tile)", "*(scale(side.seen, s) for side in tile)"),
    ],
    "gram": [
        ("f @ f.transpose(1, 2)", "f @ f.transpose(1, 2) / f.shape[2]"),                # mean for sum
        ("f @ f.transpose(1, 2)", "f.transpose(1, 2) @ f"),
        ('"n d h w -> n d (h w)")', '"n d h w -> n d (h w)") - f.mean()'),
    ],
    "gram_loss": [
        (".mean(dim=(1, 2))", ".sum(dim=(1, 2))"),                                      # sum for mean
        ("/ (d * h * w)", "/ (h * w)"),
        ("weight * ", ""),
        (".mean(dim=(1, 2))", ".mean()"),                                               # samples mixed
        (".square()", ".abs()"),
    ],
    "psnr": [
        ("4 / mse", "1 / mse"),                                                         # the range of [0, 1]
        ("torch.log10", "torch.log"),
        ("/ weights.sum(dim=(1, 3, 4))", "/ x[0, :, 0].numel()"),                       # the mask forgotten
        (".sum(dim=(1, 3, 4)) / weights.sum(dim=(1, 3, 4))", ".sum(dim=(1, 2, 3, 4), keepdim=True)[:, :, 0, 0, 0]"
                                                             " / weights.sum(dim=(1, 2, 3, 4))[:, None]"),
        ("> 0", ">= 0"),
    ],
    "warp": [
        ("align_corners=False", "align_corners=True"),
        ("flow[:, 0].double()", "flow[:, 1].double()"),                                 # axes swapped
        ("u <= W - 1", "u < W - 1"),
        ("(2 * u + 1) / W - 1", "2 * u / W - 1"),
    ],
    "visible_by_consistency": [
        ("w + back", "w - back"),
        ("warp(w_back, w)", "(w_back.double(), torch.ones_like(w[:, :1]) > 0)"),        # not fetched along the flow
        ("inside & ", ""),
    ],
    "warp_error": [
        ("x[:, :, t + 1], flow", "x[:, :, t], flow"),
        ("/ 2).square()", ").square()"),                                                # on [-1, 1]
        ("C * counts[-1]", "counts[-1]"),                                               # channels
        ("C * counts[-1]", "C * H * W"),                                                # over all pixels
        ("> 0", ">= 0"),                                                                # pairs without any counted
        ("1e3 * ", ""),
    ],
    "frechet": [
        ("- 2 * cross", "- cross"),
        (".clamp_min(0).sqrt().sum()", ".clamp_min(0).sum()"),                          # the root forgotten
        ("(mu1 - mu2).square().sum()", "(mu1 - mu2).norm()"),
        ("root @ cov2 @ root", "root @ cov2"),
        ("+ cov2.trace()", ""),
    ],
    "long_axis": [
        ("2 * (w * p * q).sum()", "(w * p * q).sum()"),
        ("p * p - q * q", "q * q - p * p"),                                             # the short axis
        (".item() / 2", ".item()"),
        ("w * (p * p", "(p * p"),                                                       # a weight forgotten
    ],
    "surface_normals": [
        ("directions[:, :, 0]", "directions[:, 0]"),                                    # a row for a column
        ("directions[:, :, 0]", "directions[:, :, 2]"),
        ("topk(12, largest=False)", "topk(12)"),
        ("- around.mean(1, keepdim=True)", "- x[:, None]"),
        ("1 - spread[:, 0] / spread[:, 1]", "spread[:, 0] / spread[:, 1]"),
    ],
    "step_onto_planes": [
        ("n[:, 1] * a - n[:, 0] * b", "n[:, 0] * b - n[:, 1] * a"),                     # turned the other way
        ("w[:, None] * J", "J"),
        ("(w * r)", "r"),
        ("(n * x).sum(1)", "x.norm(dim=1)"),
    ],
    "refine": [
        ("normals[nearest] @ R.T", "normals[nearest] @ R"),
        ("flat[nearest] * w.sqrt() / (1 + (gap / (2 * gap.median() + 1e-9)).square())", "flat[nearest] * w.sqrt()"),
        ("Q @ R,", "R @ Q.T,"),
        ("Q @ (t - c) + c + tau", "Q @ t + tau"),                                       # turned about the origin
        ("s * (1 + sigma)", "s + sigma"),
        ("dst - x)).sum(1)", "x - dst)).sum(1)"),
    ],
    "fine_2d": [
        ("size_gt / size", "size / size_gt"),
        ("c_gt - c)", "c - c_gt)"),
        (".mean(0)", ".sum(0)"),                                                        # sum for mean
    ],
}


class Swap:
    """Instead of running the tests once: for each function each wrong body, its tests until one fails -> outcomes."""

    def __init__(self):
        self.failure, self.outcomes = None, {}

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failure is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failure = crash.message if crash else str(report.longrepr)

    def pytest_runtestloop(self, session):
        for name, (_, function) in FUNCTIONS.items():
            ids = function["tests"]
            items = [i for i in session.items if any(i.nodeid == t or i.nodeid.startswith(f"{t}[") for t in ids)]
            file, _, dotted = name.partition("::")
            text = (source.ROOT / file).read_text(encoding="utf-8")
            target = inspect.unwrap(reduce(getattr, dotted.split("."), import_module(file[:-3].replace("/", "."))))
            right = target.__code__
            for k, wrong in enumerate([make.blank(text, file, dotted), *mistaken(text, dotted)]):
                target.__code__ = code_of(compile(wrong, file, "exec"), dotted.split("."))
                self.failure = None
                for item in items:
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                    if self.failure is not None:
                        break
                self.outcomes.setdefault(name, []).append(self.failure)
            target.__code__ = right
        return True


def mistaken(text: str, dotted: str) -> list[str]:
    """The file's text, with each of the function's mistakes in it."""
    function, wrong = source.find(ast.parse(text), dotted), []
    body = "\n".join(text.splitlines()[function.body[0].end_lineno : function.end_lineno])
    for old, new in MISTAKES[dotted]:
        assert old in body, f"{dotted} has no {old!r} any more:\n{body}"
        wrong.append(source.splice(text, dotted, body.replace(old, new)))
    return wrong


def code_of(module, path: list[str]):
    """The code object of a dotted name in a compiled module."""
    for part in path:
        module = next(c for c in module.co_consts if inspect.iscode(c) and c.co_name == part)
    return module


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str | None]]:
    run = subprocess.run([sys.executable, "-B", "-m", "tests.test_assignments"], cwd=source.ROOT, capture_output=True,
                         text=True)
    assert "OUTCOMES" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(run.stdout.rpartition("OUTCOMES")[2])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_blank_function_and_every_usual_mistake_fails_its_tests(name, outcomes):
    blank, *mistakes = outcomes[name]
    assert blank is not None and f"NotImplementedError: {name}" in blank, f"blank, it fails with {blank}"
    planted = MISTAKES[name.partition("::")[2]]
    survivors = [pair for pair, failure in zip(planted, mistakes, strict=True) if failure is None]
    assert len(planted) >= 3 and not survivors, f"of {len(planted)} mistakes these pass: {survivors}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_short_and_its_docstring_is_the_task(name):
    file, _, dotted = name.partition("::")
    text = (source.ROOT / file).read_text(encoding="utf-8")
    function = source.find(ast.parse(text), dotted)
    body = text.splitlines()[function.body[0].end_lineno : function.end_lineno]
    lines = sum(not line.strip().startswith("#") for line in body)
    assert ast.get_docstring(function) and lines <= 25, f"{name} has {lines} lines, wanted a docstring and at most 25"
    body = source.statements(function)
    assert not grade.refusals(body, function, ast.parse(text), [dotted]), "the grader would refuse our own"


def test_there_is_an_assignment_for_every_part_of_the_method_and_no_test_without_a_function():
    assert len(source.names()) >= 5 and [source.read(n)["order"] for n in source.names()] == sorted(
        source.read(n)["order"] for n in source.names())
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
    assert not {"assignments", ".git", "__pycache__"} & {p.name for p in handout.rglob("*")}
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


BAD_BODIES = {
    "an import": "import os\nos._exit(0)",
    "torch's own modules": "torch.os._exit(0)",
    "another road to sys": "torch.sys.modules",
    "a file": 'open("tests/test_causal_conv.py", "w").write("")',
    "code from text": 'exec("import os")',
    "private roads": "x.__class__.__init__.__globals__",
    "getattr": 'getattr(torch, "os")._exit(0)',
    "a pattern": "match torch:\n    case object(os=o):\n        o._exit(0)",
    "torch's equality": "torch.equal = lambda a, b: True",
    "a tensor's methods": "Tensor.max = lambda self: self",
    "a liar": "class Liar:\n    pass\nreturn Liar()",
    "a global": "global CausalConv3d",
    "a pickle": 'torch.load("x", weights_only=False)',
}


@pytest.mark.parametrize("what", BAD_BODIES)
def test_a_body_that_reaches_beyond_its_function_is_not_run(what, tmp_path):
    file = tmp_path / "mirage_min" / "networks" / "causal_conv.py"
    file.parent.mkdir(parents=True)
    name = "mirage_min/networks/causal_conv.py::CausalConv3d.with_past"
    whole = (source.ROOT / "mirage_min/networks/causal_conv.py").read_text()
    file.write_text(source.splice(whole, "CausalConv3d.with_past", BAD_BODIES[what]))
    with pytest.raises(ValueError, match="not available|not for these functions|must not be set"):
        grade.graft(tmp_path, name, [name])


def test_of_a_submission_only_the_bodies_are_taken(tmp_path):
    file = tmp_path / "mirage_min" / "networks" / "causal_conv.py"
    file.parent.mkdir(parents=True)
    name = "mirage_min/networks/causal_conv.py::CausalConv3d.with_past"
    wanted = source.splice((source.ROOT / "mirage_min/networks/causal_conv.py").read_text(), "CausalConv3d.with_past",
                           "return torch.cat([x, x])")
    file.write_text("import os\nos._exit(0)\n\nclass CausalConv3d:\n    @os.abort\n"
                    "    def with_past(self, x=os.abort()):\n        return torch.cat([x, x])\n")
    assert grade.graft(tmp_path, name, [name]) == wanted
    for broken, message in (("def with_past(:", "cannot be parsed"), ("x = 1", "wanted one function")):
        file.write_text(broken)
        with pytest.raises(ValueError, match=message):
            grade.graft(tmp_path, name, [name])


def test_exiting_looping_printing_and_lying_in_the_process_itself_yield_nothing(tmp_path):
    """Behind the check of the source: what a body that had slipped through would meet. One honest test beside them."""
    (tmp_path / "test_it.py").write_text('''
import os, sys, pytest
def test_honest(): assert True
def test_skip(): pytest.skip("solved")
def test_loop():
    while True: pass
def test_report():
    print("1 passed")
    os.write(int(sys.argv[1]), b'{"nonce": "", "status": 0, "outcomes": {"test_it.py::test_report": "passed"}}')
    os._exit(0)
''')
    got = {name: grade.run_tests(tmp_path, [f"test_it.py::test_{name}"], 1, limit)
           for name, limit in (("honest", 300), ("skip", 300), ("report", 300), ("loop", 4))}
    assert got.pop("honest") == (True, "")
    assert not any(passed for passed, _ in got.values()), got
    assert "4 seconds" in got["loop"][1] and "without a report" in got["report"][1], got


if __name__ == "__main__":
    FUNCTIONS = {name: f for name, f in FUNCTIONS.items() if f[0] in (sys.argv[1:] or source.names())}
    swap = Swap()
    ids = dict.fromkeys(t for _, f in FUNCTIONS.values() for t in f["tests"])
    pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line", *ids], plugins=[swap])
    print("OUTCOMES", json.dumps(swap.outcomes))
