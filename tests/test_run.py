"""What the training scripts share: settings, flags, the rate, who draws what, and how a run ends."""

import argparse
import inspect
import math
import signal
import sys
from dataclasses import dataclass

import pytest
import torch

from mirage_min.data import desk
from mirage_min.networks import weights
from mirage_min.training import checkpoint, run


@dataclass
class Recipe(run.Recipe):
    steps: int = 5
    lambda1: float = 0.5
    net: str = "vgg"


def arguments(folder, *argv) -> argparse.Namespace:
    return run.flags("A script.\n\nMore.", "stage_x", {"small": Recipe(), "paper": Recipe(steps=9)}
                     ).parse_args(["--run-folder", str(folder / "run"), "--device", "cpu", *argv])


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word, wanted", [("on", True), ("YES", True), ("1", True), ("off", False), ("False", False)])
def test_booleans_are_what_they_say(word, wanted):
    assert desk.override(Recipe(), [f"bf16={word}"]).bf16 is wanted
    with pytest.raises(ValueError, match="bf16 must be bool, got 'perhaps'"):
        desk.override(Recipe(), ["bf16=perhaps"])


def test_settings_are_typed_and_unknown_ones_refused():
    recipe = desk.override(Recipe(), ["steps=7", "lr=0.5", "cosine=true", "net=alex"])
    assert (recipe.steps, recipe.lr, recipe.cosine, recipe.net) == (7, 0.5, True, "alex")
    with pytest.raises(ValueError, match="unknown key 'stepz', there are steps, batch, .*, lambda1, net"):
        desk.override(recipe, ["stepz=7"])
    with pytest.raises(ValueError, match="steps must be int, got 'many'"):
        desk.override(recipe, ["steps=many"])


@pytest.mark.parametrize("setting, said", [("batch=0", "batch must be at least 1, got 0"), ("every=0", "every must be"),
                                           ("frames=-1", "frames must be"), ("steps=-1", "steps must not be negative"),
                                           ("lr=nan", "lr: wanted one finite number, got nan"),
                                           ("lambda1=inf", "lambda1: wanted one finite number, got inf"),
                                           ("real=1.5", "real must be a share, from 0 to 1, got 1.5"),
                                           ("varied=-1", "varied must be a share, from 0 to 1, got -1.0")])
def test_what_no_recipe_can_mean_is_refused(setting, said):
    run.check(Recipe())
    with pytest.raises(ValueError, match=said):
        run.check(desk.override(Recipe(), [setting]))


def test_a_device_is_the_one_named_and_auto_is_the_best_that_torch_can_use(monkeypatch):
    assert desk.choose_device("cpu") == "cpu"
    for there, wanted in (((True, True), "cuda"), ((False, True), "mps"), ((False, False), "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there[0])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[1])
        assert desk.choose_device("auto") == wanted
    with pytest.raises(ValueError, match="--device nonsense: there is none that this torch can use"):
        desk.choose_device("nonsense")


# ---- draws and the rate ----------------------------------------------------------------------------------------------


def test_clips_of_neighbouring_steps_and_seeds_have_random_numbers_of_their_own():
    first = [tuple(torch.rand(2, generator=run.draws(seed, step, k)).tolist())
             for seed in range(3) for step in range(20) for k in range(8)]
    again = [tuple(torch.rand(2, generator=run.draws(seed, step, k)).tolist())
             for seed in range(3) for step in range(20) for k in range(8)]
    assert first == again and len(set(first)) == len(first)


def test_a_batch_is_drawn_clip_by_clip_by_seed_step_and_place_alone():
    class Data:
        def batch(self, draws, real, varied):
            return torch.rand(len(draws), 1), torch.zeros(len(draws), 1), [
                (real, varied, *torch.rand(2, generator=g).tolist()) for g in draws]
    recipe = Recipe(seed=3, real=0.25, varied=0.5)
    x_ni, x_gt, names = run.batch(Data(), recipe, 7, range(2, 5), "cpu")
    wanted = [(0.25, 0.5, *torch.rand(2, generator=run.draws(3, 7, k)).tolist()) for k in (2, 3, 4)]
    assert names == wanted and len(x_ni) == len(x_gt) == 3


def test_the_learning_rate_rises_evenly_to_the_whole_and_falls_as_half_a_cosine_to_nothing():
    rates = [run.schedule(step, 4, 10, cosine=True) for step in range(11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[7] == pytest.approx(0.5) and rates[10] == pytest.approx(0)
    assert all(rates[4 + k] + rates[10 - k] == pytest.approx(1) for k in range(7))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert [run.schedule(step, 4, 10, cosine=False) for step in (3, 4, 9)] == [1, 1, 1]
    assert run.schedule(0, 0, 10, cosine=True) == 1


@pytest.mark.parametrize("cosine", [False, True])
def test_the_rate_of_a_step_is_the_recipes_times_the_schedule_in_every_group(cosine):
    recipe = Recipe(lr=0.3, warmup=2, steps=6, cosine=cosine, beta2=0.95, weight_decay=0.2)
    optimizer = run.optimizer({"w": torch.nn.Parameter(torch.zeros(2))}, recipe)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    for step in range(6):
        run.set_rate(optimizer, recipe, step)
        falling = 0.5 * (1 + math.cos(math.pi * (step - 2) / 4)) if cosine else 1
        wanted = 0.3 * ((step + 1) / 2 if step < 2 else falling)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([wanted, wanted])


def test_the_optimiser_has_the_recipes_rate_beta2_and_weight_decay():
    optimizer = run.optimizer({"w": torch.nn.Parameter(torch.zeros(2))}, Recipe(lr=3e-4, beta2=0.95, weight_decay=0.2))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.9, 0.95), 0.2)


def test_a_checkpoint_is_due_after_every_so_many_steps_and_after_the_last():
    assert [step for step in range(7) if run.due(step, Recipe(steps=7, every=3))] == [2, 5, 6]


# ---- how a run ends --------------------------------------------------------------------------------------------------


def launched(monkeypatch, capsys, main, folder, *argv, **given):
    """(exit status, lines on stderr) of a script with this main; given: what else launch gets."""
    monkeypatch.setattr(sys, "argv", ["train_x.py"])
    handlers = {number: signal.getsignal(number) for number in desk.SIGNALS}
    status = 0
    try:
        run.launch(main, arguments(folder, *argv), {"small": Recipe(), "paper": Recipe(steps=9)}, **given)
    except SystemExit as stop:
        status = stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("amx", [True, False])
def test_a_cpu_trains_in_bfloat16_where_that_is_faster_or_asked_for(monkeypatch, capsys, tmp_path, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": amx}, raising=False)
    taken = []
    for argv in ((), ("--set", "bf16=yes"), ("--set", "bf16=no")):
        launched(monkeypatch, capsys, lambda args, recipe: taken.append(recipe.bf16), tmp_path, *argv)
    assert taken == [amx, True, False]


@pytest.mark.parametrize("limit, amx", [(None, True), ("ALL", True), ("avx512_core_amx", True),
                                        ("AVX10_1_512_AMX", True), ("AVX512_CORE_BF16", False), ("avx2", False)])
def test_3d_convolutions_are_not_trained_in_bfloat16_where_amx_would_write_beyond_their_gradient(
        monkeypatch, capsys, tmp_path, limit, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True}, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    taken = []

    def start(*argv, conv3d=True):
        return launched(monkeypatch, capsys, lambda args, recipe: taken.append(recipe.bf16), tmp_path, *argv,
                        conv3d=conv3d)
    assert start() == start("--set", "bf16=no") == start(conv3d=False) == (0, [])
    assert taken == [not amx, False, True]
    status, lines = start("--set", "bf16=yes")
    if amx:
        assert status == 2 and len(lines) == 1 and "wanted bf16=no, or ONEDNN_MAX_CPU_ISA=" in lines[0], lines
    else:
        assert status == 0 and taken[-1] is True


@pytest.mark.parametrize("amx, limit, device", [(False, None, "cpu"), (True, None, "cuda"), (True, "AVX2", "cpu")])
def test_bfloat16_does_not_spoil_3d_convolutions_elsewhere(monkeypatch, amx, limit, device):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit or "ALL")
    assert not desk.bfloat16_spoils_conv3d(device)


def test_a_script_gets_its_recipe_and_writes_into_its_runs_folder_unless_told_otherwise(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(desk, "bfloat16_is_faster", lambda device: True)
    for argv in ((), ("--recipe", "paper", "--set", "lr=0.5", "--out", str(tmp_path / "elsewhere"))):
        assert launched(monkeypatch, capsys, lambda *given: seen.append(given), tmp_path, *argv) == (0, [])
    (one, first), (two, second) = seen
    assert first == Recipe() and second == Recipe(steps=9, lr=0.5)
    assert one.out == one.run == tmp_path / "run" and one.out.is_dir()
    assert two.out == tmp_path / "elsewhere" and two.out.is_dir()
    parser = run.flags(None, "stage_x", {"small": Recipe(), "other": Recipe()})
    default = parser.parse_args([])
    parser.set_defaults(recipe="other")
    assert "settings (default other)" in " ".join(parser.format_help().split())
    assert default.run is None and default.out is None, "and so nothing is written to the shipped weights"


@pytest.mark.parametrize("error", [ValueError("two\nlines"), OSError(28, "No space left", "file"), ImportError("x"),
                                   torch.OutOfMemoryError("no memory")])
def test_what_is_wrong_is_one_line_and_status_2(monkeypatch, capsys, tmp_path, error):
    def main(args, recipe):
        raise error
    status, lines = launched(monkeypatch, capsys, main, tmp_path)
    short = "the memory does not suffice: " * isinstance(error, torch.OutOfMemoryError)
    assert status == 2 and lines == [f"train_x.py: {short}{' '.join(str(error).split())}"]


@pytest.mark.parametrize("argv", [("--set", "lr=fast"), ("--set", "batch=0"), ("--device", "nonsense")])
def test_a_wrong_flag_is_one_line_and_status_2_and_nothing_begins(monkeypatch, capsys, tmp_path, argv):
    status, lines = launched(monkeypatch, capsys, lambda *given: pytest.fail("it began"), tmp_path, *argv)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("train_x.py: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_signal_ends_a_run_with_its_status_and_one_line_that_says_where_it_resumes(monkeypatch, capsys, tmp_path,
                                                                                       name, saved):
    number = getattr(signal, name)

    def main(args, recipe):
        w = torch.nn.Parameter(torch.zeros(3))
        optimizer = run.optimizer({"w": w}, recipe)
        for step in run.Steps(args, recipe, 0):
            w.grad = torch.ones(3)
            optimizer.step()
            if saved and step == 1:
                checkpoint.save(args.run, step + 1, {"w": w}, optimizer, {})
            if step == 3:
                signal.raise_signal(number)
    before = signal.signal(number, signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler)
    try:
        status, lines = launched(monkeypatch, capsys, main, tmp_path)
    finally:
        signal.signal(number, before)
    way_on = f"the same command resumes at step 2, from {tmp_path / 'run' / 'checkpoint.safetensors'}"
    wanted = way_on if saved else "there is no checkpoint yet: the same command starts again"
    assert (status, lines) == (128 + number, [f"train_x.py: stopped by {name} in step 3; {wanted}"])


def test_a_signal_before_the_first_step_is_said_to_be_that(monkeypatch, capsys, tmp_path):
    status, lines = launched(monkeypatch, capsys, lambda *given: signal.raise_signal(signal.SIGTERM), tmp_path)
    assert status == 143 and lines == ["train_x.py: stopped by SIGTERM before its first step; there is no checkpoint "
                                       "yet: the same command starts again"]


def test_a_signal_that_is_ignored_as_by_nohup_stays_ignored(monkeypatch, capsys, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        status = launched(monkeypatch, capsys, lambda *given: signal.raise_signal(signal.SIGHUP), tmp_path)[0]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status == 0


def test_the_bar_is_silent_where_stderr_is_no_terminal_or_is_closed(monkeypatch, capsys):
    args = argparse.Namespace(step=None)
    assert list(run.Steps(args, Recipe(steps=5), 2)) == [2, 3, 4] and args.step == 4
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", None)
    assert list(run.Steps(args, Recipe(steps=5), 4)) == [4]


def test_a_bar_on_a_terminal_shows_the_steps_that_a_resumed_run_has_behind_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = run.Steps(argparse.Namespace(step=None), Recipe(steps=5), 2)
    bar.set_postfix(mse="0.5")
    bar.close()
    assert "2/5" in (shown := capsys.readouterr().err) and "mse=0.5" in shown


@pytest.mark.parametrize("keep", [True, False])
def test_autocast_makes_one_copy_of_a_weight_or_one_for_each_use(keep):
    weight, x = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(1, 4)
    with run.autocast(Recipe(bf16=True), "cpu", keep):
        casts = {(x @ weight).grad_fn.next_functions[1][0] for _ in range(2)}
    assert len(casts) == (1 if keep else 2) and (x @ weight).dtype == torch.float32


# ---- what a run says of itself ---------------------------------------------------------------------------------------


def test_a_file_of_weights_says_how_many_steps_of_which_recipe_made_it(tmp_path):
    about = run.about(Recipe(lr=0.5))
    weights.save_tensors(tmp_path / "x.safetensors", {}, about)
    assert about["step"] == "5" and '"lr": 0.5' in about["recipe"]


def test_a_folder_is_called_as_it_is_seen_from_another_and_a_hub_id_as_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b" / "c").mkdir(parents=True)
    assert run.seen_from(tmp_path / "b" / "c", tmp_path / "a") == "../../a"
    assert run.seen_from(tmp_path, "THUDM/CogVideoX1.5-5B") == "THUDM/CogVideoX1.5-5B"


def test_parameters_are_counted_by_adapter():
    params = {"fusion.0.w": torch.zeros(1000), "fusion.1.w": torch.zeros(234), "lora.x.A": torch.zeros(2, 3)}
    assert run.count(params) == "fusion 1,234, lora 6"


def test_nothing_here_knows_a_flag_or_a_setting_of_one_script():
    import train_harmonize
    import train_vae
    source = inspect.getsource(run) + inspect.getsource(checkpoint)
    for script in (train_vae, train_harmonize):
        own = {field for field in script.Recipe.__dataclass_fields__} - set(run.Recipe.__dataclass_fields__)
        assert own and not [name for name in own | {"vae2d", "prompt", "mirage"}
                            if f'"{name}"' in source or f"recipe.{name}" in source or f"args.{name}" in source]
