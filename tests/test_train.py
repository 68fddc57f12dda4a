"""The training scripts: each stage trains what it should and nothing else, resumes bit-equal, and its result runs."""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_harmonize
import train_vae
from mirage_min.data.pairs import Pairs
from mirage_min.method import lora, perceptual
from mirage_min.networks import imagenet, weights
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import HARMONISATION, RECONSTRUCTION, TRANSFORMER
from mirage_min.training import memory, run, watch
from tests import scripts, signals, small

SCRIPTS = Path(__file__).parents[1]


def save_inputs(folder: Path, save_base=small.save_cogvideox) -> None:
    """A base, a 2D VAE, pairs and random backbones for the losses."""
    save_base(folder)
    small.save_backbones(folder, vgg_layers=9)
    (folder / "pairs").mkdir()
    for i in range(3):
        x = torch.randint(0, 256, (2, 3, 17, 48, 64), dtype=torch.uint8)
        boxes = torch.tensor([[4.0, 6.0, 20.5, 17.0]]).repeat(17, 1)
        weights.save_tensors(folder / "pairs" / f"{i}.safetensors", {"x_ni": x[0], "x_gt": x[1], "boxes": boxes})


def stage_a(work: Path, out: Path, prompt: Path | None = None, **settings) -> Path:
    args = argparse.Namespace(data=work / "pairs", base=work / "base", vae2d=vae2d(work), prompt=prompt, val=None,
                              perceptual=work, real=None, out=out, run=out / "run", device="cpu", stage="stage_a")
    train_vae.main(args, train_vae.Recipe(**dict(
        steps=2, batch=1, frames=9, height=32, width=32, lr=1e-2, lpips="squeeze", rank=2, every=1, bf16=False)
        | settings))
    return out


def stage_h(work: Path, out: Path, mirage: Path | None = None, val=None, **settings) -> Path:
    args = argparse.Namespace(data=work / "pairs", mirage=mirage or out, base=None, vae2d=None, val=val,
                              perceptual=work, real=None, out=out, run=out / "run_h", device="cpu", stage="stage_h")
    train_harmonize.main(args, train_harmonize.Recipe(**dict(
        steps=2, batch=1, frames=9, height=32, width=32, lr=1e-2, warmup=1, gram_from=1, lpips="squeeze", rank=2,
        dit_rank=2, dit_alpha=1.0, every=1, bf16=False) | settings))
    return out


def vae2d(work: Path) -> Path | None:
    return work / "vae_2d" if (work / "vae_2d").exists() else None


plan = memory.plan


def without_plan(*args, **settings) -> str:
    """In place of memory.plan, which takes longer than these small steps."""
    return ""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "plan", without_plan)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    save_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def trained(work, tmp_path_factory):
    """Both stages, trained a little, and the bytes of all files of the base before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "plan", without_plan)
        out = tmp_path_factory.mktemp("trained")
        before = {p: p.read_bytes() for p in work.rglob("*.safetensors")}
        stage_a(work, out, every=2)
        a = (out / "stage_a.safetensors").read_bytes()
        (out / "val").mkdir()
        (out / "val" / "0.safetensors").symlink_to(work / "pairs" / "0.safetensors")
        stage_h(work, out, val=out / "val")
    assert a == (out / "stage_a.safetensors").read_bytes(), "stage H must leave stage A as it is"
    assert before == {p: p.read_bytes() for p in work.rglob("*.safetensors")}, "the base must stay as it is"
    return out


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_stage_a_trains_fusion_and_reconstruction_and_stage_h_the_other_two(trained):
    a, about = weights.load_tensors(trained / "stage_a.safetensors")
    assert a["fusion.0.weight"].abs().max() > 0
    assert all(a[k].abs().max() > 0 for k in a if "lora_B" in k)
    assert {k.split(".")[0] for k in a} == {"fusion", RECONSTRUCTION}
    h, about_h = weights.load_tensors(trained / "stage_h.safetensors")
    assert {k.split(".")[0] for k in h} == {TRANSFORMER, HARMONISATION} and about_h["t"] == "199"
    assert all(h[k].abs().max() > 0 for k in h if "lora_B" in k)
    assert about["base"] == about_h["base"] and about["vae2d"] == about_h["vae2d"], "H names the base of A"
    assert (trained / about_h["base"] / "vae").is_dir()


def test_a_trained_folder_harmonises_a_clip(trained):
    mirage = Mirage.from_pretrained(trained)
    for name in (RECONSTRUCTION, HARMONISATION, TRANSFORMER):
        assert list(lora.adapters(mirage.adapters(name), name)), f"no {name} adapter"
    frames = list(mirage.stream(iter(torch.zeros(3, 3, 40, 40))))
    assert len(frames) == 3 and frames[0].shape == (3, 40, 40)


def test_stage_a_continues_from_another_with_the_scales_that_it_was_trained_at(work, trained, tmp_path):
    init = str(trained / "stage_a.safetensors")
    begun, _ = weights.load_tensors(trained / "stage_a.safetensors")
    same, _ = weights.load_tensors(stage_a(work, tmp_path / "0", steps=0, rank=5, init=init) / "stage_a.safetensors")
    assert begun.keys() == same.keys() and all(torch.equal(begun[k], same[k]) for k in begun)
    on, _ = weights.load_tensors(stage_a(work, tmp_path / "1", steps=1, lr=1e-4, seed=9, init=init)
                                 / "stage_a.safetensors")
    moved = {k: (on[k] - begun[k]).abs().max().item() for k in begun}
    scales = {k for k in begun if k.endswith((".s_h", ".s_f"))}
    assert len(scales) == 4 and all(moved[k] == 0 for k in scales)
    assert all(0 < moved[k] <= 1.1e-4 for k in moved.keys() - scales), "one AdamW step of 1e-4 moves by that at most"
    with pytest.raises(ValueError, match="gone.safetensors"):
        stage_a(work, tmp_path / "2", init=str(tmp_path / "gone.safetensors"))
    with pytest.raises(ValueError, match="stage_h.safetensors: wanted a stage A"):
        stage_a(work, tmp_path / "3", init=str(trained / "stage_h.safetensors"))


def test_fine_tuning_by_chopgrad_continues_from_stage_h_and_its_folder_is_whole(work, trained, tmp_path):
    begun, _ = weights.load_tensors(trained / "stage_h.safetensors")
    same = stage_h(work, tmp_path / "0", mirage=trained, steps=0, dit_rank=5)  # the ranks are those of the file
    here, about = weights.load_tensors(same / "stage_h.safetensors")
    assert begun.keys() == here.keys() and all(torch.equal(begun[k], here[k]) for k in begun)
    assert {k: about[k] for k in about if "rank" in k} == {"transformer.rank": "2", "harmonisation.rank": "2"}
    on = stage_h(work, tmp_path / "1", mirage=trained, steps=1, frames=17, height=48, width=48, tiles=2, lr=1e-4,
                 gram_from=0, checkpoint_decoder=True, checkpoint_dit=True)
    moved, about = weights.load_tensors(on / "stage_h.safetensors")
    largest = max((moved[k] - begun[k]).abs().max() for k in begun)
    assert 0 < largest <= 1.1e-4, f"one AdamW step of 1e-4 moves by 1e-4 at most, this moved by {largest:.1e}"
    assert about["window"] == "5" and len(list(Mirage.from_pretrained(on).stream(iter(torch.zeros(2, 3, 16, 16))))) == 2


def test_a_stage_h_that_has_one_of_its_two_adapters_gets_the_other(work, trained, tmp_path):
    part = Path(shutil.copytree(trained, trained.parent / "part"))  # beside it, for the base is named from there
    tensors, about = weights.load_tensors(trained / "stage_h.safetensors")
    only = {key: t for key, t in tensors.items() if key.startswith(TRANSFORMER)}
    weights.save_tensors(part / "stage_h.safetensors", only, about)
    after = weights.load_tensors(stage_h(work, tmp_path, mirage=part) / "stage_h.safetensors")[0]
    assert after.keys() == tensors.keys() and any(key.startswith(HARMONISATION) for key in after)


def test_stage_h_in_another_folder_leaves_what_stage_a_and_the_prompt_say_of_themselves(work, trained, tmp_path):
    stage_h(work, tmp_path, mirage=trained, steps=1)
    for name in ("stage_a", "prompt"):
        (was, said), (now, says) = (weights.load_tensors(p / f"{name}.safetensors") for p in (trained, tmp_path))
        assert was.keys() == now.keys() and all(torch.equal(was[key], now[key]) for key in was)
        assert said | {"base": 0, "vae2d": 0} == says | {"base": 0, "vae2d": 0}, f"{name}: {said} became {says}"


def test_mirage_on_wan_trains_both_stages_and_harmonises_a_clip(tmp_path):
    """ChopGrad's variant: features of the 3D encoder in 2D mode, flow, t = 200, nine frames in three groups."""
    save_inputs(tmp_path, small.save_wan)
    out = stage_h(tmp_path, stage_a(tmp_path, tmp_path / "out", steps=1))
    trained, about = weights.load_tensors(out / "stage_h.safetensors")
    assert about["t"] == "200" and "vae2d" not in about
    assert all(trained[k].abs().max() > 0 for k in trained if "lora_B" in k)
    mirage = Mirage.from_pretrained(out)
    assert mirage.alpha_bar is None and mirage.vae2d is None and len(mirage.vae.fusion) == 1
    x = torch.rand(1, 3, 6, 40, 24) * 2 - 1
    with torch.no_grad():
        z = mirage.vae.encode(mirage.pad(x))
        assert torch.equal(mirage.denoise(z), z - mirage.dit(z, 200, mirage.text)), "z_DR = z_NI - prediction"
        whole = mirage(x).clamp(-1, 1)
    streamed = torch.stack(list(mirage.stream(iter(x[0].unbind(1)), window=9)), dim=1)[None]
    difference = (streamed - whole).abs().max()
    assert whole.shape == x.shape and difference < 1e-5, f"stream and forward differ by {difference:.1e}"


# ---- interruptions ---------------------------------------------------------------------------------------------------


def both_stages(work: Path, out: Path) -> None:
    stage_a(work, out, steps=6, frames=1)
    stage_h(work, out, steps=6, frames=1)


def kill_six_times(work: Path, out: Path) -> None:
    """Fork a process that trains, six times; kill it at a random moment, every other time after one more checkpoint: so
    it dies while it starts as well as in steps and while it writes.

    It runs in a fresh interpreter, where nothing has used torch's threads before the first fork.
    """
    import torch._dynamo  # noqa: F401  (or each of the eight processes would, with its first optimizer)

    torch.set_num_threads(1)
    memory.plan, watch.Log.report = without_plan, lambda *args: None  # neither changes what is trained

    def start(out: Path) -> int:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2), os.dup2(2, 1)
                both_stages(work, out)
                status = 0
            finally:
                os._exit(status)
        return pid

    def checkpoints() -> list[int]:
        return [p.stat().st_mtime_ns for p in out.glob("run*/checkpoint.safetensors")]

    begin = time.time()
    assert os.waitpid(start(out / "whole"), 0)[1] == 0
    step = (time.time() - begin) / 12
    out, killed = out / "killed", 0
    for i in range(6):  # that many kills let at most some 9 of the 12 steps through
        before, pid = checkpoints(), start(out)
        while i % 2 and checkpoints() == before and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
        time.sleep(random.uniform(0, step))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert os.waitpid(start(out), 0)[1] == 0
    print("killed", killed, "times")


def test_killed_six_times_at_random_moments_a_run_ends_bit_equal(work, tmp_path):
    call = f"from tests.test_train import *; kill_six_times(Path({str(work)!r}), Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0 and "killed 6 times" in done.stdout, done.stdout + done.stderr
    for name in ("stage_a.safetensors", "stage_h.safetensors", "prompt.safetensors", "run_h/checkpoint.safetensors"):
        one, two = (weights.load_tensors(tmp_path / run / name)[0] for run in ("whole", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    logs = [[json.loads(line) for line in (tmp_path / run / "run_h" / "log.jsonl").read_text().splitlines()]
            for run in ("whole", "killed")]
    assert [{**line, "seconds": 0} for line in logs[0]] == [{**line, "seconds": 0} for line in logs[1]]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("stage", ["A", "H"])
def test_every_step_has_the_rate_of_the_schedule_and_a_gradient_of_norm_1_at_most(work, trained, tmp_path, monkeypatch,
                                                                                   stage, cosine):
    """Losses so heavy that every gradient is clipped."""
    step, seen = torch.optim.AdamW.step, []

    def watched(optimizer, *given):
        grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append((optimizer.param_groups[0]["lr"], torch.stack(grads).norm().item()))
        return step(optimizer, *given)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(watch.Log, "report", lambda *given: None)
    settings = dict(steps=5, frames=1, lr=1e-3, warmup=2, cosine=cosine, every=5)
    if stage == "A":
        stage_a(work, tmp_path, lambda1=1e5, **settings)
    else:
        stage_h(work, tmp_path, mirage=trained, mse=1e5, **settings)
    falling = [1, 0.75, 0.25] if cosine else [1, 1, 1]
    assert [rate for rate, _ in seen] == pytest.approx([1e-3 * factor for factor in [0.5, 1, *falling][:5]])
    assert [norm for _, norm in seen] == pytest.approx([1] * 5, rel=1e-3)


@pytest.mark.parametrize("change", ["clips", "weights", "prompt"])
def test_a_run_notices_other_clips_weights_or_prompts_under_the_same_names(work, tmp_path, change):
    """Nothing that the command says has changed."""
    mine = Path(shutil.copytree(work, tmp_path / "work"))
    prompt = mine / "prompt.safetensors"
    config = json.loads((mine / "base" / "transformer" / "config.json").read_text())
    text = torch.ones(1, config["max_text_seq_length"], config["text_embed_dim"])
    weights.save_tensors(prompt, {"text": text})
    settings = dict(prompt=prompt, frames=1)
    stage_a(mine, tmp_path / "out", steps=1, **settings)
    stage_a(mine, tmp_path / "out", steps=2, **settings)
    if change == "clips":
        file = mine / "pairs" / "1.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif change == "weights":
        file = mine / "base" / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in weights.load_tensors(file)[0].items()}
        tensors["decoder.conv_out.conv.bias"][0] += 1e-3
        weights.save_tensors(file, tensors, {"format": "pt"})
    else:
        weights.save_tensors(prompt, {"text": 2 * text})
    wanted = "clips: then" if change == "clips" else "weights: then digest"
    with pytest.raises(ValueError, match=f"belongs to another run, 1 things differ: {wanted}"):
        stage_a(mine, tmp_path / "out", steps=3, **settings)


def interrupted(command: list, folder: Path, number: int) -> tuple[int, str]:
    """A command that gets a signal once it has a checkpoint -> (its status, stderr)."""
    # as many threads as here: sums over another number of them differ in the last bit
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment.pop("MKL_CBWR")  # the command sets it
    with open(folder / "stderr", "w+") as stderr:
        child = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=stderr, env=environment,
                                 preexec_fn=signals.heard)
        try:
            while not (folder / "run" / "checkpoint.safetensors").exists() and child.poll() is None:
                time.sleep(0.02)
            child.send_signal(number)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
        stderr.seek(0)
        return status, stderr.read()


def test_a_script_that_gets_a_signal_says_in_one_line_where_it_stopped_and_resumes_bit_equal(work, tmp_path):
    torch.set_num_threads(2)  # whose sums would differ without MKL_CBWR
    settings = dict(steps=10**6, batch=1, frames=1, height=32, width=32, lpips="squeeze", rank=2, every=1, bf16="no",
                    lr=0.01)
    command = [sys.executable, SCRIPTS / "train_vae.py", "--recipe", "mirage", "--data", work / "pairs", "--base",
               work / "base", "--vae2d", work / "vae_2d", "--perceptual", work, "--out", tmp_path, "--run-folder",
               tmp_path / "run", "--device", "cpu"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    status, said = interrupted(command, tmp_path, signal.SIGTERM)
    assert status == 143 and said.count("\n") == 1, said
    pattern = r"train_vae.py: stopped by SIGTERM in step (\d+); the same command resumes at step (\d+), from .*/check"
    step, done = map(int, re.match(pattern, said).groups())
    assert step in (done - 1, done) and done >= 1 and not (tmp_path / "stage_a.safetensors").exists()
    stage_a(work, tmp_path, steps=done + 1, frames=1, every=10**6)  # a constant rate: the end may be elsewhere
    stage_a(work, tmp_path / "whole", steps=done + 1, frames=1, every=10**6)
    one, two = (weights.load_tensors(where / "stage_a.safetensors")[0] for where in (tmp_path, tmp_path / "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_resumes_with_other_pieces_but_not_with_other_settings(work, tmp_path):
    stage_a(work, tmp_path, steps=1, batch=2)
    with pytest.raises(ValueError, match=r"belongs to another run, 2 things differ: lr: then 0.01, now 0.02; seed: "):
        stage_a(work, tmp_path, batch=2, lr=0.02, seed=3)
    stage_a(work, tmp_path, steps=2, batch=2, accumulate=2, checkpoint_decoder=True)
    for setting in (dict(tiles=2), dict(d_trunc=0)):
        with pytest.raises(ValueError, match=f"belongs to another run, 1 things differ: {next(iter(setting))}: "):
            stage_a(work, tmp_path, steps=2, batch=2, **setting)
    assert weights.load_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == "2"


def test_a_clip_that_is_not_finite_stops_the_run_by_name_and_the_last_checkpoint_stays(work, tmp_path, monkeypatch):
    read = Pairs._read

    def poisoned(pairs, i, *given, **how):
        x, y = read(pairs, i, *given, **how)
        return [x * float("nan") if i == 1 else x, y]
    monkeypatch.setattr(Pairs, "_read", poisoned)
    with pytest.raises(ValueError, match=r"step (\d): not finite: mse nan, lpips nan, .*clips: 1.safetensors") as error:
        stage_a(work, tmp_path, steps=9, seed=2)
    step = int(str(error.value).split()[1].rstrip(":"))
    tensors, about = weights.load_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert about["step"] == str(step) and step > 0, "the checkpoint is that of the step before"
    assert all(t.isfinite().all() for t in tensors.values())
    with pytest.raises(ValueError, match=r"step 0: not finite: mse [\d.]+, lpips [\d.]+, gradient norm nan"):
        stage_a(work, tmp_path / "b", lambda1=float("nan"), seed=2)
    assert not (tmp_path / "b" / "run" / "checkpoint.safetensors").exists()


# ---- what one sees ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_log_settings_curves_pictures_and_scores(trained):
    folder = trained / "run_h"
    first, *scores = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert first["step"] == 0 and "gram" not in first and first["lpips"] > 0
    assert [line["step"] for line in scores] == [0, 1]
    assert all(line[f"val_{name}"] > 0 for line in scores for name in ("psnr", "lpips", "psnr_actor", "lpips_actor"))
    assert json.loads((folder / "settings.json").read_text())["dit_rank"] == 2
    assert Image.open(folder / "step_2.png").size == (3 * 32, watch.CAPTION + 32)
    assert Image.open(folder / "losses.png").width == 800


def test_a_held_out_pair_that_breaks_later_is_left_out(work, trained, tmp_path, monkeypatch, capsys):
    val, read = Pairs(work / "pairs", 9), Pairs.read

    def broken(pairs, i, integer):
        if pairs is val and i == 1:
            raise ValueError("1.safetensors: does not decode")
        return read(pairs, i, integer)
    monkeypatch.setattr(Pairs, "read", broken)
    monkeypatch.setattr(run, "Pairs", lambda at, *rest: val if at == "val" else Pairs(at, *rest))
    stage_h(work, tmp_path, mirage=trained, val="val", steps=1)
    assert "left out: 1.safetensors: does not decode" in capsys.readouterr().out
    assert (tmp_path / "run_h" / "checkpoint.safetensors").exists()


def test_what_is_wrong_is_one_line_and_exit_status_2(tmp_path):
    done = scripts.run("train_vae.py", "--data", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no usable pairs" in done.stderr, done.stderr


def test_a_script_has_at_most_12_flags_and_a_help_where_python_keeps_no_docstrings_too():
    program = """if True:
        import runpy, sys
        for script in ("train_vae.py", "train_harmonize.py", "train_base.py"):
            sys.argv = [script, "--help"]
            print("#")
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit:
                pass"""
    done = subprocess.run([sys.executable, "-OO", "-c", program], cwd=SCRIPTS, capture_output=True, text=True)
    helps = done.stdout.split("#")[1:]
    assert done.returncode == 0 and len(helps) == 3, done.stdout + done.stderr
    for text in helps:
        flags = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE)) - {"--help"}
        assert 8 <= len(flags) <= 12, text


# ---- memory ----------------------------------------------------------------------------------------------------------


def allocated(call, trace: Path) -> int:
    """Peak bytes of `call()` above what there was before, by the book of PyTorch's own allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        first = torch.empty(1)  # the first entry in the book
        call()
    profile.export_chrome_trace(str(trace))
    book = [event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return max(entry["Total Allocated"] for entry in book) - book[0]["Total Allocated"] + first.nbytes


@pytest.mark.parametrize("settings", [{}, {"checkpoint_dit": True, "d_trunc": 0}])
def test_the_memory_of_a_step_is_foretold_within_15_percent(work, trained, tmp_path, settings):
    """Parameters, moments and bytes for backward are those of the real step; the whole is what the allocator gives."""
    recipe = train_harmonize.Recipe(**dict(batch=1, frames=17, height=32, width=48, lpips="squeeze", bf16=False)
                                    | settings)
    mirage = Mirage.from_pretrained(trained)
    models = torch.nn.ModuleList([mirage, perceptual.Lpips(imagenet.Features("squeeze", work)),
                                  imagenet.Features("vgg", work)])
    params = [p.requires_grad_() for name in (TRANSFORMER, HARMONISATION)
              for p in lora.parameters(mirage.adapters(name), name)]
    size = (1, 3, 17, 32, 48)

    def step(models, *clips):
        train_harmonize.forward_and_backward(models, recipe, *clips, defaultdict(float))
    parts = memory.expected(models, step, size, "cpu")
    assert all(p.grad is None for p in params), "a plan must leave no trace"
    with memory.SavedBytes(models) as held:
        measured = allocated(lambda: step(models, *torch.rand(2, *size)), tmp_path / "trace.json")
    assert all(p.grad is not None for p in params)
    optimizer = torch.optim.AdamW(params)
    optimizer.step()
    real = {"parameters": sum(t.nbytes for t in (*models.parameters(), *models.buffers())), "backward": held.peak,
            "moments": sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)}
    for name, bytes in real.items():
        assert parts[name] == pytest.approx(bytes, rel=0.01), f"{name}: foretold {parts[name]:,} bytes, real {bytes:,}"
    foretold, measured = sum(parts.values()), measured + real["parameters"] + real["moments"]
    ratio = foretold / measured
    assert 0.85 < ratio < 1.15, f"foretold {foretold:,} bytes, measured {measured:,}: ratio {ratio:.3f}"


def test_a_step_that_cannot_fit_names_the_settings_that_bring_it_down(work, trained, monkeypatch):
    mirage = Mirage.from_pretrained(trained)
    models = torch.nn.ModuleList([mirage, perceptual.Lpips(imagenet.Features("squeeze", work)),
                                  imagenet.Features("vgg", work)])
    for name in (TRANSFORMER, HARMONISATION):
        for p in lora.parameters(mirage.adapters(name), name):
            p.requires_grad_()
    recipe = train_harmonize.Recipe(batch=2, frames=9, height=32, width=32, lpips="squeeze", bf16=False, d_trunc=0)
    assert plan(models, train_harmonize.forward_and_backward, recipe, "cpu").startswith("a step needs about 0.0")
    monkeypatch.setattr(memory, "LESS", {key: memory.LESS[key] for key in ("accumulate", "shard", "frames")})
    monkeypatch.setattr(memory, "available", lambda device: 40 * 2**20)
    first, *lines = plan(models, train_harmonize.forward_and_backward, recipe, "cpu").splitlines()
    assert "it will not fit" in first
    assert [line.split()[1].split("=")[0] for line in lines] == [
        "accumulate", "frames"], lines


# ---- settings -------------------------------------------------------------------------------------------------------


COMMON = dict(steps=10_000, batch=8, accumulate=1, frames=9, height=512, width=768, lr=1e-4, beta2=0.999,
              weight_decay=0.01, cosine=False, real=0, varied=0, lpips="vgg", rank=16, alpha=16, d_trunc=1, tiles=1)
PAPERS = {  # Mirage §4.1; ChopGrad B.4, which gives ranks to both
    ("A", "mirage"): COMMON | dict(lambda1=0.1, warmup=1, init=""),
    ("A", "chopgrad"): COMMON | dict(lambda1=0.1, warmup=1, init="", height=480, width=832, lr=2e-4, beta2=0.99),
    ("H", "mirage"): COMMON | dict(lambda2=0.1, gram_from=2_000, mse=0, gram="vgg", dit_rank=128, dit_alpha=64,
                                   warmup=500),
    ("H", "chopgrad"): COMMON | dict(lambda2=0.1, gram_from=0, mse=0, gram="vgg", dit_rank=128, dit_alpha=64, warmup=1,
                                     steps=1_000, batch=1, frames=49, height=720, width=1280, lr=2e-4, beta2=0.99,
                                     weight_decay=0.1, tiles=4),
}


@pytest.mark.parametrize("stage, name", PAPERS)
def test_the_papers_recipes_are_the_papers_in_every_number(stage, name):
    recipe = (train_vae if stage == "A" else train_harmonize).RECIPES[name]
    found = {key: getattr(recipe, key) for key in PAPERS[stage, name]}
    assert found == PAPERS[stage, name]
    left = vars(recipe).keys() - found.keys()
    assert left <= {"bf16", "seed", "every", "real_frames", "checkpoint_decoder", "checkpoint_dit", "shard"}


def test_the_prompt_given_to_stage_a_is_kept_and_one_of_another_shape_is_refused(tmp_path):
    save_inputs(tmp_path)
    config = json.loads((tmp_path / "base" / "transformer" / "config.json").read_text())
    L, D = config["max_text_seq_length"], config["text_embed_dim"]
    weights.save_tensors(tmp_path / "prompt.safetensors", {"text": (text := torch.randn(1, L, D))}, {"text": "remove"})
    out = stage_a(tmp_path, tmp_path / "out", tmp_path / "prompt.safetensors", steps=1)
    kept, about = weights.load_tensors(out / "prompt.safetensors")
    assert torch.equal(kept["text"], text) and about == {"text": "remove"}
    with pytest.raises(ValueError, match="wanted a tensor `text`"):
        stage_a(tmp_path, tmp_path / "out1", out / "stage_a.safetensors", steps=1)
    weights.save_tensors(tmp_path / "long.safetensors", {"text": torch.randn(1, L + 1, D)})
    with pytest.raises(ValueError, match=rf"takes a prompt of \[1, {L}, {D}\], given \[1, {L + 1}, {D}\]"):
        stage_a(tmp_path, tmp_path / "out2", tmp_path / "long.safetensors", steps=1)
