"""A run resumes as what it was, and nothing else resumes it: not other settings, flags, clips or weights, and nothing
from a checkpoint that is damaged."""

import json
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from mirage_min.networks import weights
from mirage_min.training import checkpoint


@dataclass
class Recipe:
    steps: int = 10
    lr: float = 0.1
    tiles: int = 1
    cosine: bool = False
    every: int = checkpoint.may_change(5)


class Model(nn.Module):
    """What is trained, what is frozen, a table that is neither, and a config."""

    def __init__(self):
        super().__init__()
        self.w, self.frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2, 4), requires_grad=False)
        self.register_buffer("text", torch.ones(1, 2))
        self.table, self.config = torch.linspace(0, 1, 5), {"scaling_factor": 0.7}


@pytest.fixture
def clips(tmp_path):
    """Three clips: a small file, a large one and a folder of images."""
    folder = tmp_path / "clips"
    (folder / "images").mkdir(parents=True)
    (folder / "small").write_bytes(bytes(range(100)))
    (folder / "large").write_bytes(bytes(3_000_000))
    for name in ("0.png", "1.png"):
        (folder / "images" / name).write_bytes(name.encode() * 10)
    return [folder / name for name in ("small", "large", "images")]


def identify(files=(), model=None, recipe=Recipe(), flags: dict = {}, **facts) -> dict:
    model = model or Model()
    return checkpoint.identify(Namespace(**flags), recipe, list(files), model, {"w": model.w}, **facts)


def differences(one: dict, other: dict) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


# ---- what a run is ---------------------------------------------------------------------------------------------------


def test_a_flag_and_a_setting_are_compared_unless_they_are_known_to_change_nothing():
    """A new flag is guarded without a word about it anywhere."""
    given = dict(out="first", base=Path("cog"), new=3, none=None)
    free = dict(data="a", perceptual="b", val="c", run="d", device="cpu", recipe="small", set=["lr=0.1"], step=7)
    one = identify(flags=given | free)
    assert one == identify(flags=given | {key: "another" for key in free} | {"base": "cog"})
    for key, value in dict(out="second", base="wan", new=4, real="x", vae2d="x", prompt="x", mirage="x").items():
        assert differences(one, identify(flags=given | free | {key: value})) == {f"--{key}"}
    assert differences(one, identify(flags=given | {"new": None})) == {"--new"}


def test_of_a_recipe_what_is_marked_may_change_and_steps_may_under_a_constant_rate_only():
    one = identify()
    assert one == identify(recipe=Recipe(every=7)) == identify(recipe=Recipe(steps=20))
    assert differences(one, identify(recipe=Recipe(tiles=2, lr=0.2))) == {"tiles", "lr"}
    falling = identify(recipe=Recipe(cosine=True))
    assert differences(falling, identify(recipe=Recipe(cosine=True, steps=20))) == {"steps"}
    assert differences(one, falling) == {"steps", "cosine"}


def test_what_may_change_in_the_recipes_is_this_and_no_more():
    import train_harmonize
    import train_r3d2
    import train_vae
    for script, wanted in ((train_vae, {"checkpoint_decoder"}), (train_r3d2, {"checkpoint_unet", "half"}),
                           (train_harmonize, {"checkpoint_decoder", "checkpoint_dit", "shard"})):
        for name, recipe in script.RECIPES.items():
            kept = identify(recipe=recipe).keys()
            free = {field for field in vars(recipe) if field not in kept}
            assert free == {"every", "accumulate"} | wanted | (set() if recipe.cosine else {"steps"}), name


@pytest.mark.parametrize("change", ["a byte of a small file", "another large file", "a name", "an image", "one more",
                                    "one fewer", "a longer file"])
def test_other_clips_under_the_same_names_are_another_run(clips, change):
    before = identify(clips)
    assert before == identify(clips), "nothing was changed"
    small, large, images = clips
    if change == "a byte of a small file":
        small.write_bytes(bytes(range(99)) + b"x")
    elif change == "another large file":
        large.write_bytes(bytes([1]) * 3_000_000)
    elif change == "a name":
        clips[0] = small.rename(small.with_name("other"))
    elif change == "an image":
        (images / "1.png").write_bytes(b"1.pnG" * 10)
    elif change == "one more":
        clips.append(small)
    elif change == "one fewer":
        clips.pop()
    else:
        large.write_bytes(bytes(3_000_001))
    assert differences(before, identify(clips)) == {"clips"}


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 60_000, 65_536])
def test_of_a_file_of_up_to_64_kib_every_byte_counts(tmp_path, size):
    file, seen = tmp_path / "x", set()
    places = sorted({0, size // 3, size // 2, size - 1})
    for place in places:
        content = bytearray(size)
        content[place] = 1
        file.write_bytes(content)
        seen.add(checkpoint.digest_of_file(file))
    file.write_bytes(bytes(size))
    assert len(seen | {checkpoint.digest_of_file(file)}) == len(places) + 1


def test_of_a_large_file_16_blocks_from_the_first_to_the_last_byte_count(tmp_path):
    file, size = tmp_path / "x", 1_000_000
    file.write_bytes(bytes(size))
    plain, noticed = checkpoint.digest_of_file(file), []
    for place in range(0, size, 4096):
        content = bytearray(size)
        content[place:place + 4096] = b"x" * min(4096, size - place)
        file.write_bytes(content)
        noticed.append(checkpoint.digest_of_file(file) != plain)
    assert noticed[0] and noticed[-1] and 16 <= sum(noticed) <= 32, sum(noticed)


@pytest.mark.parametrize("place", ["a frozen weight", "a buffer", "a table", "the config", "its shape", "a fact"])
def test_other_weights_under_the_same_name_are_another_run_and_what_is_trained_is_not_asked(place):
    model, before = Model(), identify(t=199)
    model.w.data += 1
    assert identify(model=model, t=199) == before, "what is trained comes from the checkpoint"
    if place == "a frozen weight":
        model.frozen.data[1, 3] += 1e-6
    elif place == "a buffer":
        model.text[0, 1] = 2
    elif place == "a table":
        model.table[4] = 0.5
    elif place == "the config":
        model.config["scaling_factor"] = 0.8
    elif place == "its shape":
        model.frozen.data = model.frozen.data.view(4, 2)
    changed = identify(model=model, t=200 if place == "a fact" else 199)
    assert differences(before, changed) == {"t" if place == "a fact" else "weights"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_a_digest_is_of_values_in_their_order_whatever_the_layout_and_of_so_many_bytes(dtype):
    x = (torch.arange(24).view(1, 4, 2, 3) % 5).to(dtype)
    other = x.clone()
    other[0, 3, 1, 2] = 1 - other[0, 3, 1, 2].int()
    digest = checkpoint.digest({"x": x, "zero": torch.tensor(2.0), "none": torch.zeros(0, 2)})
    assert re.fullmatch("[0-9a-f]{8}", digest)
    for y, same in ((x.to(memory_format=torch.channels_last), True), (other, False), (x.view(4, 1, 2, 3), False)):
        found = checkpoint.digest({"none": torch.zeros(0, 2), "x": y, "zero": torch.tensor(2.0)})
        assert (found == digest) is same
    for most in (3 * x.element_size(), 4 * x.element_size() - 1):      # of each tensor, the elements that fit
        first = checkpoint.digest({"x": x, "y": x}, most)
        for place in range(24):
            changed = x.clone().flatten()
            changed[place] = 1 - changed[place].int()
            found = checkpoint.digest({"x": x, "y": changed.view_as(x)}, most)
            assert (found == first) is (place >= 3) or x.element_size() == 1, f"{most} bytes, element {place}"


# ---- writing and reading ---------------------------------------------------------------------------------------------


def trained(folder, steps=(2, 4)):
    """Checkpoints after these steps -> (what is trained, its optimiser)."""
    w, scale = nn.Parameter(torch.zeros(3)), torch.tensor(7.0)
    optimizer = torch.optim.AdamW([w], lr=0.1)
    for step in range(max(steps)):
        w.grad = torch.tensor([1.0, -2.0, float(step)])
        optimizer.step()
        if step + 1 in steps:
            checkpoint.save(folder, step + 1, {"w": w, "scale": scale}, optimizer, identify())
    return {"w": w, "scale": scale}, optimizer


def resumed(folder, identity=None, **more):
    w, scale = nn.Parameter(torch.ones(3)), torch.tensor(1.0)
    optimizer = torch.optim.AdamW([w], lr=0.1)
    step = checkpoint.resume(folder, {"w": w, "scale": scale}, optimizer, identity or identify(), **more)
    return step, {"w": w, "scale": scale}, optimizer


def test_a_run_without_a_checkpoint_begins_at_step_0(tmp_path):
    step, tensors, optimizer = resumed(tmp_path)
    assert step == 0 and tensors["w"].tolist() == [1, 1, 1] and not optimizer.state


def test_a_checkpoint_brings_back_the_step_what_is_trained_and_the_moments(tmp_path, capsys):
    before, was = trained(tmp_path)
    step, tensors, optimizer = resumed(tmp_path)
    assert step == 4 and f"resumes at step 4, from {tmp_path}" in capsys.readouterr().out
    assert all(torch.equal(tensors[key], before[key]) for key in before)
    one, two = was.state[before["w"]], optimizer.state[tensors["w"]]
    assert one.keys() == two.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_another_run_is_refused_and_what_differs_is_named(tmp_path):
    trained(tmp_path)
    other = identify() | {"lr": 0.2, "--base": "wan"}
    with pytest.raises(ValueError, match="belongs to another run, 2 things differ: --base: then None, now wan; lr: "
                                         r"then 0.1, now 0.2 \(--run-folder"):
        resumed(tmp_path, other)
    w = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"2 things differ: 1 unexpected: scale; 1 wrongly shaped: w \(wanted \[4\], "):
        checkpoint.resume(tmp_path, {"w": w}, torch.optim.AdamW([w]), identify())


def test_more_steps_than_are_wanted_are_refused(tmp_path):
    trained(tmp_path)
    assert resumed(tmp_path, steps=4)[0] == 4
    with pytest.raises(ValueError, match="checkpoint.safetensors: 4 steps are done, which is more than the 3 "):
        resumed(tmp_path, steps=3)


def rewritten(folder, change):
    """Change a checkpoint's tensors and metadata, as another program might."""
    tensors, about = weights.load_tensors(folder / checkpoint.NEWEST)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors, about)
    weights.save_tensors(folder / checkpoint.NEWEST, tensors, about)


DAMAGE = {
    "a flipped bit": lambda t, a: t["param/w"].view(torch.int32).bitwise_xor_(torch.tensor([0, 1, 0])),
    "no moments": lambda t, a: [t.pop(f"{key}/w") for key in ("exp_avg", "exp_avg_sq", "step")],
    "one moment fewer": lambda t, a: t.pop("exp_avg/w"),
    "moments of another kind": lambda t, a: t.update({"exp_avg/w": t["exp_avg/w"].long()}),
    "moments of another shape": lambda t, a: t.update({"exp_avg/w": torch.zeros(2)}),
    "a key of no parameter": lambda t, a: t.update({"exp_avg/x": torch.zeros(3)}),
    "complex weights": lambda t, a: t.update({"param/w": t["param/w"].to(torch.complex64)}),
    "another step": lambda t, a: a.update(step="3"),
    "a negative step": lambda t, a: a.update(step="-1"),
    "a step that is no number": lambda t, a: a.update(step="many"),
    "no step": lambda t, a: a.pop("step"),
    "no settings": lambda t, a: a.pop("settings"),
    "settings that are a list": lambda t, a: a.update(settings="[]"),
    "deep settings": lambda t, a: a.update(settings="[" * 100_000),
    "no digest": lambda t, a: a.pop("digest"),
    "no metadata": lambda t, a: a.clear(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_named(tmp_path, damage):
    trained(tmp_path)
    rewritten(tmp_path, DAMAGE[damage])
    newest, before = tmp_path / checkpoint.NEWEST, tmp_path / checkpoint.PREVIOUS
    with pytest.raises(ValueError) as error:
        resumed(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{newest}: ") and "\n" not in said and len(said) < 1000, said
    assert said.endswith(f"the one before it, of step 2, is whole: to resume there, mv {before} {newest}")
    before.replace(newest)  # as it says
    assert resumed(tmp_path)[0] == 2


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_with_the_digest_of_another_program_is_refused_in_one_line_too(tmp_path, damage):
    def change(tensors, about):
        DAMAGE[damage](tensors, about)
        if damage not in ("no digest", "no metadata"):
            about["digest"] = checkpoint.digest_of_run(tensors, about.get("step", ""), about.get("settings", ""))
    trained(tmp_path)
    rewritten(tmp_path, change)
    if damage in ("a flipped bit", "another step"):  # then it is just another checkpoint
        assert resumed(tmp_path)[0] == (4 if damage == "a flipped bit" else 3)
        return
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / checkpoint.NEWEST))) as error:
        resumed(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 4000, None], ids=["empty", "zeros", "half"])
def test_a_file_that_is_no_checkpoint_is_refused_and_the_way_out_named(tmp_path, content):
    trained(tmp_path, steps=(2,))
    file = tmp_path / checkpoint.NEWEST
    file.write_bytes(file.read_bytes()[:99] if content is None else content)
    with pytest.raises(ValueError, match=f"truncated or corrupt: .*; no other is whole: to start again, rm {file}$"):
        resumed(tmp_path)


def test_killed_between_the_two_renamings_a_run_resumes_from_the_older_checkpoint(tmp_path, monkeypatch):
    trained(tmp_path, steps=(2, 4))
    (tmp_path / checkpoint.NEWEST).unlink()
    assert resumed(tmp_path)[0] == 2
    assert checkpoint.way_on(tmp_path).endswith(f"resumes at step 2, from {tmp_path / checkpoint.PREVIOUS}")


def test_a_checkpoint_that_cannot_be_written_leaves_both_older_ones(tmp_path, monkeypatch):
    trained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*safetensors'"):
        trained(tmp_path, steps=(6,))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_way_on_is_the_newest_checkpoint_or_the_start(tmp_path):
    assert checkpoint.way_on(tmp_path) == "there is no checkpoint yet: the same command starts again"
    trained(tmp_path)
    assert checkpoint.way_on(tmp_path) == f"the same command resumes at step 4, from {tmp_path / checkpoint.NEWEST}"
    assert json.loads(weights.load_tensors(tmp_path / checkpoint.NEWEST)[1]["settings"]) == identify()
