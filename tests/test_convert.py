"""convert.py: pickles of tensors become folders that load; every entry is accounted for; code is never run."""

import io
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import convert
from mirage_min.networks import weights
from mirage_min.networks.dit_cosmos import CosmosDiT, CosmosDiTConfig
from mirage_min.networks.vae_wan import WanVAE
from mirage_min.systems.harmonizer import Harmonizer
from tests.test_dit_cosmos import SMALL, nvidia_state
from tests.torchvision_stub import stub

stub()

from diffusers import AutoencoderKLWan  # noqa: E402
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers  # noqa: E402

FILE = "diffusion_pytorch_model.safetensors"


def original_wan_vae(dim: int) -> dict[str, torch.Tensor]:
    """A state dict as Wan 2.1's repository has it, from a list of its layers, on the default device."""
    shapes = {}

    def conv(name, c_in, c_out, *kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c_out, c_in, *kernel), (c_out,)

    def residual(name, c_in, c_out):
        shapes[f"{name}.residual.0.gamma"], shapes[f"{name}.residual.3.gamma"] = (c_in, 1, 1, 1), (c_out, 1, 1, 1)
        conv(f"{name}.residual.2", c_in, c_out, 3, 3, 3), conv(f"{name}.residual.6", c_out, c_out, 3, 3, 3)
        if c_in != c_out:
            conv(f"{name}.shortcut", c_in, c_out, 1, 1, 1)

    def middle_and_head(name, c_middle, c_head, c_out):
        for i in (0, 2):
            residual(f"{name}.middle.{i}", c_middle, c_middle)
        shapes[f"{name}.middle.1.norm.gamma"] = (c_middle, 1, 1)
        conv(f"{name}.middle.1.to_qkv", c_middle, 3 * c_middle, 1, 1)
        conv(f"{name}.middle.1.proj", c_middle, c_middle, 1, 1)
        shapes[f"{name}.head.0.gamma"] = (c_head, 1, 1, 1)
        conv(f"{name}.head.2", c_head, c_out, 3, 3, 3)

    conv("encoder.conv1", 3, dim, 3, 3, 3)
    widths, layer = [dim, dim, 2 * dim, 4 * dim, 4 * dim], 0
    for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
        for c in (c_in, c_out):
            residual(f"encoder.downsamples.{layer}", c, c_out)
            layer += 1
        if i < 3:
            conv(f"encoder.downsamples.{layer}.resample.1", c_out, c_out, 3, 3)
            if i > 0:
                conv(f"encoder.downsamples.{layer}.time_conv", c_out, c_out, 3, 1, 1)
            layer += 1
    middle_and_head("encoder", 4 * dim, 4 * dim, 32)
    conv("conv1", 32, 32, 1, 1, 1), conv("conv2", 16, 16, 1, 1, 1)
    conv("decoder.conv1", 16, 4 * dim, 3, 3, 3)
    widths, layer = [4 * dim, 4 * dim, 4 * dim, 2 * dim, dim], 0
    for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
        for c in (c_in // 2 if i else c_in, c_out, c_out):
            residual(f"decoder.upsamples.{layer}", c, c_out)
            layer += 1
        if i < 3:
            conv(f"decoder.upsamples.{layer}.resample.1", c_out, c_out // 2, 3, 3)
            if i < 2:
                conv(f"decoder.upsamples.{layer}.time_conv", c_out, 2 * c_out, 3, 1, 1)
            layer += 1
    middle_and_head("decoder", 4 * dim, dim, 3)
    return {name: torch.randn(shape) * (0.05 if len(shape) > 1 else 1.0) for name, shape in shapes.items()}


def release(folder: Path, **change) -> Path:
    """A file as DiffusionHarmonizer's authors publish it, with a small network."""
    torch.manual_seed(0)
    small = SMALL | {"in_channels": 16, "out_channels": 16}
    content = {"state_dict_unet": nvidia_state(**small) | nvidia_state("net_ema.", **small),
               "state_dict_vae": {f"model.{name}": v.bfloat16() for name, v in original_wan_vae(8).items()},
               "optimizer": {"state": {}, "param_groups": [{"lr": 2e-5, "betas": (0.9, 0.999)}]}}
    torch.save({name: v for name, v in (content | change).items() if v is not None}, folder / "release.pkl")
    return folder / "release.pkl"


def refused(capsys, *argv) -> str:
    """The one line with which a call ends; it wrote nothing."""
    out = Path(argv[1])
    before = sorted(out.parent.iterdir())
    assert convert.cli([str(a) for a in argv]) == 2
    printed, line = capsys.readouterr()
    assert printed == "" and line.startswith("convert.py: ") and line.count("\n") == 1
    assert sorted(out.parent.iterdir()) == before, "something was written"
    return line


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_the_harmonizer_becomes_a_folder_that_loads_and_every_entry_is_counted(tmp_path, capsys):
    file = release(tmp_path)
    assert convert.cli([str(file), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    blocks, total = SMALL["num_layers"], len(nvidia_state())
    left_out = {"net_ema.*, another copy of the weights": total, "_extra_state": 4 * blocks + 1, "accum_": 4,
                "pos_embedder": 3, "attention to a text, which is null here": 8 * blocks}
    for reason, n in left_out.items():
        assert f"left out: {n} of {reason}" in printed
    kept = 2 * total - sum(left_out.values())
    assert f"{tmp_path / 'out' / 'transformer'}: {kept} tensors" in printed
    assert f"{tmp_path / 'out' / 'vae'}: {len(original_wan_vae(8))} tensors" in printed and "bfloat16" in printed
    assert "left out: optimizer" in printed

    harmonizer = Harmonizer.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert harmonizer.settings.wiring == "release" and not harmonizer.dit.config.cross_attention
    state = torch.load(file, weights_only=True)["state_dict_unet"]
    assert torch.equal(harmonizer.dit.proj_out.weight, state["net.final_layer.linear.weight"])
    with torch.no_grad():
        assert harmonizer(torch.rand(1, 3, 2, 16, 16)).shape == (1, 3, 2, 16, 16)


def test_the_average_is_taken_where_it_is_asked_for(tmp_path, capsys):
    file = release(tmp_path)
    assert convert.cli([str(file), str(tmp_path / "out"), "--average"]) == 0
    ours = load_file(tmp_path / "out" / "transformer" / FILE)["proj_out.weight"]
    state = torch.load(file, weights_only=True)["state_dict_unet"]
    assert torch.equal(ours, state["net_ema.final_layer.linear.weight"])
    capsys.readouterr()
    torch.save(nvidia_state(), tmp_path / "model.pt")
    assert "averaged" in refused(capsys, tmp_path / "model.pt", tmp_path / "none", "--average")


def test_cosmos_keeps_its_attention_to_the_text_and_its_shapes_tell_the_config(tmp_path):
    torch.manual_seed(0)
    state = nvidia_state(num_attention_heads=2, mlp_ratio=3.0, num_layers=2)
    state["net.t_embedding_norm._extra_state"] = None  # TransformerEngine wrote other things than tensors, too
    torch.save(state, tmp_path / "model.pt")
    assert convert.cli([str(tmp_path / "model.pt"), str(tmp_path / "out")]) == 0
    dit = CosmosDiT.from_pretrained(tmp_path / "out", "transformer")
    assert dit.config == CosmosDiTConfig(**SMALL | dict(num_attention_heads=2, mlp_ratio=3.0, num_layers=2,
                                                        max_size=(128, 240, 240), qk_eps=1e-6))
    by_name = CosmosDiT(dit.config)
    by_name.load_state_dict({CosmosDiT.translate_key(k): v for k, v in state.items() if CosmosDiT.translate_key(k)})
    z, text = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(dit(z, 0.2, text), by_name(z, 0.2, text))


def test_wans_vae_computes_what_diffusers_own_conversion_computes(tmp_path):
    torch.manual_seed(0)
    state = original_wan_vae(8)
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    assert convert.cli([str(tmp_path / "Wan2.1_VAE.pth"), str(tmp_path / "out")]) == 0
    vae, reference = WanVAE.from_pretrained(tmp_path / "out", "vae"), AutoencoderKLWan(base_dim=8)
    reference.load_state_dict(convert_wan_vae_to_diffusers(dict(state)))
    x = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x)
        mean = reference.encode(x).latent_dist.mean
        mean = (mean - torch.tensor(reference.config.latents_mean).view(1, 16, 1, 1, 1)) / torch.tensor(
            reference.config.latents_std).view(1, 16, 1, 1, 1)
        assert (z - mean).abs().max() <= 1e-5 * mean.std(), f"largest difference {(z - mean).abs().max():.1e}"


def test_the_names_of_the_official_wan_vae_are_mapped_one_to_one():
    with torch.device("meta"):
        theirs, ours = original_wan_vae(96), WanVAE().state_dict()
    mapped = {convert.wan_name(name): tuple(v.shape) for name, v in theirs.items()}
    assert mapped == {name: tuple(v.shape) for name, v in ours.items()} and len(mapped) == len(theirs)
    assert list(mapped) == list(convert_wan_vae_to_diffusers(dict(theirs)))


def test_difixs_state_dicts_keep_their_names_and_its_ranks_stay_beside_them(tmp_path, capsys):
    unet = {"conv_in.weight": torch.randn(4, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": torch.randn(2, 2)}
    vae = {"decoder.conv_in.lora_A.vae_skip.weight": torch.randn(4, 3), "decoder.skip_conv_1.weight": torch.randn(2, 2)}
    torch.save({"rank_vae": 4, "vae_lora_target_modules": ["conv1", "conv2"], "state_dict_unet": unet,
                "state_dict_vae": vae, "optimizer": {"state": {}}}, tmp_path / "difix.pkl")
    assert convert.cli([str(tmp_path / "difix.pkl"), str(tmp_path / "out")]) == 0
    for name, state in (("state_dict_unet", unet), ("state_dict_vae", vae)):
        found, about = weights.load_tensors(tmp_path / "out" / f"{name}.safetensors")
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
        assert json.loads(about["rank_vae"]) == 4 and json.loads(about["vae_lora_target_modules"]) == ["conv1", "conv2"]
    assert "left out: optimizer\n" in capsys.readouterr().out


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_a_state_dict_of_another_network_keeps_its_names_and_types(tmp_path, wrap):
    state = {"features.0.weight": torch.randn(2, 3).half(), "features.0.bias": nn.Parameter(torch.randn(2)),
             "count": torch.tensor(7), "shared": torch.randn(4, 4).T}
    torch.save(wrap(state), tmp_path / "any.pth", _use_new_zipfile_serialization=False)  # the older format, too
    assert convert.cli([str(tmp_path / "any.pth"), str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / FILE)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) and found[k].dtype == state[k].dtype for k in state)


def test_what_a_state_dict_holds_besides_tensors_is_named_among_what_was_left_out(tmp_path, capsys):
    w = torch.randn(2, 3)
    nested = {"state_dict": {"w": w, "n": 4}, "epoch": 3, "optimizer": {"x": w}}
    for content, wanted in (({"w": w, "epoch": 3}, "left out: 1 of type int"),
                            (nested, "left out: 1 of type int"), (nested, "left out: optimizer\n"),
                            ({"state_dict_unet": {"w": w, "n": 3}, "state_dict_vae": {"v": w}}, "1 of type int")):
        torch.save(content, tmp_path / "a.pt")
        assert convert.cli([str(tmp_path / "a.pt"), str(tmp_path / "out"), "--drop", "none"]) == 0
        assert wanted in capsys.readouterr().out
        for file in (tmp_path / "out").iterdir():
            assert not any("no tensor" in key for key in weights.load_tensors(file)[1]), "a count, kept as a setting"
        shutil.rmtree(tmp_path / "out")


def test_tensors_that_share_memory_are_written_each_by_itself(tmp_path):
    w = torch.randn(4, 3)
    state = {"a": w, "tied": w, "rows": w[1:]}
    torch.save(state, tmp_path / "a.pt")
    assert convert.cli([str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / FILE)
    assert all(torch.equal(found[name], v) for name, v in state.items())


def test_a_rest_of_averaged_weights_is_counted(tmp_path, capsys):
    torch.save(nvidia_state() | {"net_ema.decay": torch.zeros(1)}, tmp_path / "model.pt")
    assert convert.cli([str(tmp_path / "model.pt"), str(tmp_path / "out")]) == 0
    assert "left out: 1 of net_ema" in capsys.readouterr().out


# ---- what is refused -----------------------------------------------------------------------------------------------


class Code:
    """What unpickles by running a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, capsys, new):
    state = {"state_dict": nvidia_state(), "callback": Code(tmp_path / "mark")}
    torch.save(state, tmp_path / "evil.pkl", _use_new_zipfile_serialization=new)
    assert "system" in refused(capsys, tmp_path / "evil.pkl", tmp_path / "out")
    assert not (tmp_path / "mark").exists()
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": Code(tmp_path / "mark")}))
    refused(capsys, tmp_path / "plain.pkl", tmp_path / "out")
    assert not (tmp_path / "mark").exists()


def test_what_is_more_than_tensors_is_refused_by_its_name(tmp_path, capsys):
    torch.save({"state": torch.zeros(2), "extra": io.BytesIO(b"x")}, tmp_path / "a.pt")
    assert "it asks for _io.BytesIO" in refused(capsys, tmp_path / "a.pt", tmp_path / "out")
    torch.save(nn.Linear(2, 2), tmp_path / "b.pt")
    assert "torch.nn.modules.linear.Linear" in refused(capsys, tmp_path / "b.pt", tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda w: w.to_sparse(), lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)])
def test_a_tensor_that_safetensors_cannot_hold_is_named(tmp_path, capsys, make):
    torch.save({"w": torch.zeros(2), "odd": make(torch.ones(2, 2))}, tmp_path / "a.pt")
    assert "odd: wanted a dense tensor" in refused(capsys, tmp_path / "a.pt", tmp_path / "out")


def test_torchscript_is_refused(tmp_path, capsys):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript" in refused(capsys, tmp_path / "script.pt", tmp_path / "out")


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"{}", lambda b: b"\x80\x02N.",
                                   lambda b: b"version https://git-lfs.github.com/spec/v1\n"],
                         ids=["cut", "empty", "JSON", "a pickled None", "Git LFS"])
def test_a_damaged_file_is_one_line(tmp_path, capsys, spoil):
    torch.save({"a": torch.randn(5000)}, tmp_path / "good.pt")
    (tmp_path / "bad.pt").write_bytes(spoil((tmp_path / "good.pt").read_bytes()))
    assert str(tmp_path / "bad.pt") in refused(capsys, tmp_path / "bad.pt", tmp_path / "out")


def test_other_files_are_named(tmp_path, capsys):
    assert "no such file" in refused(capsys, tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert "already" in refused(capsys, tmp_path / "a.safetensors", tmp_path / "out")
    for content, said in (([torch.zeros(2)], "a list"), ({"a": 1, "b": "x"}, "holds no tensors by name, but a, b")):
        torch.save(content, tmp_path / "a.pt")
        assert said in refused(capsys, tmp_path / "a.pt", tmp_path / "out")


@pytest.mark.parametrize("gone", ["state_dict_unet", "state_dict_vae"])
def test_one_of_the_two_state_dicts_is_not_enough(tmp_path, capsys, gone):
    there = {"state_dict_unet": "state_dict_vae", "state_dict_vae": "state_dict_unet"}[gone]
    line = refused(capsys, release(tmp_path, **{gone: None}), tmp_path / "out")
    assert f"wanted state_dict_unet and state_dict_vae, got only {there}" in line


def test_a_missing_an_unknown_and_a_wrongly_shaped_entry_are_named(tmp_path, capsys):
    state = nvidia_state()
    for change, said in (({"net.blocks.1.mlp.layer2.weight": None}, "1 missing: transformer_blocks.1.ff.net.2.weight"),
                         ({"net.blocks.1.gate": torch.zeros(1)}, "1 unexpected: blocks.1.gate"),
                         ({"net.t_embedding_norm.weight": torch.ones(3)}, "time_embed.norm.weight (wanted [60]"),
                         ({"conditioner.table": torch.zeros(1)}, "1 unexpected: conditioner.table"),
                         ({"net.blocks.0.self_attn.q_norm.weight": None}, "transformer_blocks.0.attn1.norm_q.weight")):
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "model.pt")
        assert said in refused(capsys, tmp_path / "model.pt", tmp_path / "out")
    torch.save(state | {"conditioner.table": torch.zeros(1)}, tmp_path / "model.pt")
    assert convert.cli([str(tmp_path / "model.pt"), str(tmp_path / "out"), "--drop", "conditioner."]) == 0
    assert "left out: 1 of conditioner.* (--drop)" in capsys.readouterr().out


@pytest.mark.parametrize("name, tensor, said", [
    ("net.blocks.999999999.mlp.layer1.weight", torch.zeros(1), "num_layers: wanted an integer from 1 to 1000"),
    ("net.x_embedder.proj.1.weight", torch.zeros(0, 20), "patch_embed.proj.weight, this has none that fits"),
    ("net.blocks.0.self_attn.q_norm.weight", torch.zeros(0), "attn1.norm_q.weight, this has none that fits"),
    ("net.x_embedder.proj.1.weight", torch.zeros(48, 4), "in_channels: wanted an integer from 1")])
def test_sizes_that_no_transformer_has_are_refused_before_it_is_built(tmp_path, capsys, name, tensor, said):
    torch.save(nvidia_state() | {name: tensor}, tmp_path / "model.pt")
    assert said in refused(capsys, tmp_path / "model.pt", tmp_path / "out")


def test_video_to_world_and_another_vae_are_refused(tmp_path, capsys):
    torch.save(nvidia_state(in_channels=17, out_channels=16), tmp_path / "v2w.pt")
    assert "in_channels" in refused(capsys, tmp_path / "v2w.pt", tmp_path / "out")
    state = original_wan_vae(8)
    del state["conv2.bias"]
    torch.save(state, tmp_path / "vae.pth")
    assert "1 missing: post_quant_conv.bias" in refused(capsys, tmp_path / "vae.pth", tmp_path / "out")
    torch.save(state | {"encoder.conv1.weight": torch.tensor(1.0)}, tmp_path / "vae.pth")
    assert "base_dim: wanted an integer from 1" in refused(capsys, tmp_path / "vae.pth", tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone_and_an_empty_one_is_filled(tmp_path, capsys):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    (tmp_path / "out").mkdir()
    assert convert.cli([str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert "no empty folder" in refused(capsys, tmp_path / "a.pt", tmp_path / "out")
    assert "no empty folder" in refused(capsys, tmp_path / "a.pt", tmp_path / "a.pt")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    file, save = release(tmp_path), weights.save_tensors

    def full_disk(path, *rest):
        if "vae" in path.parts:
            raise OSError(28, "No space left on device", str(path))
        save(path, *rest)

    monkeypatch.setattr(weights, "save_tensors", full_disk)
    assert "No space left" in refused(capsys, file, tmp_path / "out")


@pytest.mark.parametrize("error", [AssertionError("storage key '7' not found"), KeyError("x"), TypeError("x"),
                                   struct.error("unpack requires a buffer of 4 bytes")])
def test_whatever_a_damaged_file_makes_torch_raise_is_one_line(tmp_path, capsys, monkeypatch, error):
    def load(*args, **settings):
        raise error
    (tmp_path / "a.pt").write_bytes(b"\x80\x02damaged")
    monkeypatch.setattr(torch, "load", load)
    assert "truncated, damaged or no checkpoint" in refused(capsys, tmp_path / "a.pt", tmp_path / "out")
