"""Which system a folder holds is read from the folder; infer.py runs each of them, with the options that it takes."""

import json
import re

import pytest
import torch
from PIL import Image

import infer
from mirage_min.data.video import read_clip, write_clip
from mirage_min.networks import weights
from mirage_min.networks.dit_cosmos import CosmosDiT, CosmosDiTConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.systems import load
from mirage_min.systems.harmonizer import Harmonizer
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import RECONSTRUCTION
from mirage_min.systems.r3d2 import R3D2
from tests import small

SYSTEMS = {"mirage": Mirage, "harmonizer": Harmonizer, "r3d2": R3D2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each system, small and random; their names say nothing."""
    root = tmp_path_factory.mktemp("systems")
    small.save_cogvideox(root)
    (root / "base").rename(root / "1_base")
    mirage = Mirage.from_base(root / "1_base", root / "vae_2d")
    mirage.add_lora(RECONSTRUCTION, 1, 1.0)
    bases = {"base": "../1_base", "vae2d": "../vae_2d"}
    (root / "1").mkdir()
    mirage.save_stage(root / "1" / "stage_a.safetensors", [RECONSTRUCTION], bases, fusion=True)
    weights.save_tensors(root / "1" / "prompt.safetensors", {"text": mirage.text})
    torch.manual_seed(0)
    dit = CosmosDiT(CosmosDiTConfig(num_attention_heads=1, attention_head_dim=24, num_layers=2, text_embed_dim=4,
                                    adaln_lora_dim=4))
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    Harmonizer(WanVAE(WanVAEConfig(base_dim=4, num_res_blocks=1)), dit).save_pretrained(root / "2")
    small.r3d2().save_pretrained(root / "3")
    return dict(zip(SYSTEMS, (root / "1", root / "2", root / "3")))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Six frames of 22 x 18, as a folder of PNGs."""
    path = tmp_path_factory.mktemp("frames") / "in"
    write_clip(path, torch.rand(3, 6, 18, 22, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    return path


def infer_py(capsys, *argv):
    """infer.py's status and what it wrote."""
    status = infer.cli([str(argument) for argument in argv])
    return status, capsys.readouterr()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_folder_says_which_system_it_holds_and_infer_runs_it(folders, frames, tmp_path, capsys, name):
    assert load.system_in(folders[name]) is SYSTEMS[name] and load.system_in(str(folders[name])) is SYSTEMS[name]
    status, said = infer_py(capsys, frames, tmp_path / "out", "--model", folders[name], "--device", "cpu")
    assert status == 0, said.err
    x, y = read_clip(frames), read_clip(tmp_path / "out")
    system = SYSTEMS[name].from_pretrained(folders[name], **vars(SYSTEMS[name].Options()))
    wanted = torch.stack(list(system.stream(x.unbind(1))), dim=1)
    assert (y - wanted).abs().max() <= 1.01 / 255 and (y - x).abs().max() > 0.1


@pytest.mark.parametrize("name, options", [
    ("mirage", {"window": 5, "tiles": 2, "margin": 0, "change_only": False}), ("mirage", {"change_only": False}),
    ("harmonizer", {"wiring": "paper"}), ("harmonizer", {"change_only": "yes"}),
    ("r3d2", {"reference": "reference.png", "batch": 4})])
def test_what_a_system_takes_is_set_by_key_and_makes_the_difference_that_it_should(
        folders, frames, tmp_path, capsys, monkeypatch, name, options):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((22, 18)).convert("RGB").save("reference.png")
    settings = [text for key, value in options.items() for text in ("--set", f"{key}={value}")]
    for out, more in (("plain", []), ("set", settings)):
        status, said = infer_py(capsys, frames, tmp_path / out, "--model", folders[name], "--device", "cpu", *more)
        assert status == 0, said.err
    system = SYSTEMS[name].from_pretrained(folders[name], **options)
    wanted = torch.stack(list(system.stream(read_clip(frames).unbind(1))), dim=1)
    plain, changed = read_clip(tmp_path / "plain"), read_clip(tmp_path / "set")
    assert (changed - wanted).abs().max() <= 1.01 / 255 and not torch.equal(changed, plain)


@pytest.mark.parametrize("name, flags, said", [
    ("harmonizer", ["--set", "tiles=2"], "unknown key 'tiles', there are crf, .*, wiring, change_only$"),
    ("harmonizer", ["--base", "x"], "unknown key 'base', there are "),
    ("harmonizer", ["--set", "wiring=new"], "wiring: wanted one of '', 'release', 'paper', got 'new'"),
    ("r3d2", ["--window", "5"], "unknown key 'window', there are crf, .*, batch, reference, prompt, t$"),
    ("r3d2", ["--set", "batch=0"], "batch: wanted an integer from 1 to"),
    ("r3d2", ["--set", "reference=no.png"], "no.png: no such file"),
    ("mirage", ["--set", "wiring=paper"], "unknown key 'wiring', there are crf, .*, window, tiles, margin, "
     "change_only$")])
def test_what_a_system_does_not_take_is_refused_with_all_it_takes(folders, frames, tmp_path, capsys, name, flags, said):
    status, output = infer_py(capsys, frames, tmp_path / "out", "--model", folders[name], "--device", "cpu", *flags)
    line, = output.err.splitlines()
    assert status == 2 and not output.out and re.search(said, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["harmonizer", "r3d2"])
def test_a_system_whose_numbers_overflow_ends_with_its_frame(folders, frames, tmp_path, capsys, monkeypatch, name):
    system = SYSTEMS[name].from_pretrained(folders[name])
    with torch.no_grad():
        [*system.vae.decoder.parameters()][-1].fill_(float("inf"))
    monkeypatch.setattr(SYSTEMS[name], "from_pretrained", lambda path, **options: system)
    status, output = infer_py(capsys, frames, tmp_path / "out", "--model", folders[name], "--device", "cpu")
    assert status == 2 and output.err.startswith("infer.py: frame 0 (counted from 0): ") and "not finite" in output.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, said", [
    ({}, "holds no system: neither stage_a.safetensors"),
    ({"model_index.json": {"_class_name": "FluxPipeline", "vae": []}}, "R3D2, Restorer, but 'FluxPipeline'"),
    ({"model_index.json": {}}, "but 'no _class_name'"), ({"model_index.json": []}, "wanted a JSON object, got a list"),
    ({"model.pkl": 0}, "model.pkl: not loaded, because unpickling .*python convert.py FILE FOLDER")])
def test_a_folder_of_no_system_is_refused_by_what_is_in_it(tmp_path, content, said):
    for name, value in content.items():
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=said):
        load.system_in(tmp_path)


@pytest.mark.parametrize("name, said", [("model.pkl", "unpickling .* convert.py FILE FOLDER"),
                                        ("absent", "no such folder"), ("clip.mp4", "is a file: name its folder")])
def test_a_path_that_is_no_folder_is_refused(tmp_path, name, said):
    if name == "clip.mp4":
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=said):
        load.system_in(tmp_path / name)
