"""A Mirage's folder: what the stages save comes back the same, and what does not fit is refused by file and field."""

import pytest
import torch

from mirage_min.method import lora
from mirage_min.networks import weights
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import HARMONISATION, RECONSTRUCTION, TRANSFORMER
from tests import small


def clip(T, H, W):
    return torch.rand(1, 3, T, H, W, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def folder(tmp_path):
    """A base and a 2D VAE on disk, as published."""
    small.save_cogvideox(tmp_path)
    return tmp_path


def test_what_the_stages_save_comes_back_the_same(folder):
    trained = Mirage.from_base(folder / "base", folder / "vae_2d", torch.randn(1, 2, 8))
    for name, rank, alpha in ((RECONSTRUCTION, 2, 4.0), (TRANSFORMER, 3, 1.5), (HARMONISATION, 2, 2.0)):
        trained.add_lora(name, rank, alpha)
        for p in lora.parameters(trained.adapters(name), name):
            torch.nn.init.normal_(p, std=0.1)
    for block in trained.vae.fusion:
        torch.nn.init.normal_(block.weight, std=0.1)
    weights.save_tensors(folder / "prompt.safetensors", {"text": trained.text})
    bases = {"base": "base", "vae2d": "vae_2d"}
    trained.save_stage(folder / "stage_a.safetensors", [RECONSTRUCTION], bases, fusion=True)
    without_h = Mirage.from_pretrained(folder)
    trained.save_stage(folder / "stage_h.safetensors", [TRANSFORMER, HARMONISATION], {"t": "249", "window": "5"})
    again = Mirage.from_pretrained(folder)
    assert (again.t, again.window) == (249, 5)
    trained.t = 249
    x = clip(9, 16, 24)
    with torch.no_grad():
        difference = (again(x) - trained(x)).abs().max()
        assert difference < 1e-5, f"largest difference {difference:.1e}, allowed 1e-5"
        assert not torch.allclose(without_h(x), trained(x))
    assert not any(p.requires_grad for p in again.parameters())


def test_the_transformers_adapter_has_peft_names_and_both_alphas_are_kept(folder):
    trained = Mirage.from_base(folder / "base", folder / "vae_2d")
    trained.add_lora(TRANSFORMER, 4, 2.0)
    trained.save_stage(folder / "h.safetensors", [TRANSFORMER], {})
    tensors, about = weights.load_tensors(folder / "h.safetensors")
    assert "transformer.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in tensors
    assert about["transformer.rank"] == "4" and about["transformer.alpha"] == "2.0"


def test_cogvideox_without_a_2d_vae_is_refused(folder):
    with pytest.raises(ValueError, match=r"is CogVideoX, for which an AutoencoderKL .* \(--vae2d\)"):
        Mirage.from_base(folder / "base", None)


def test_wan_with_a_2d_vae_which_it_would_not_use_is_refused(tmp_path):
    small.save_wan(tmp_path)
    mirage = Mirage.from_base(tmp_path / "base", "")
    assert mirage.vae2d is None and mirage.t == 200, "ChopGrad B.4's t"
    with pytest.raises(ValueError, match=r"is Wan, .* wanted no AutoencoderKL \(--vae2d ''\), got no/such"):
        Mirage.from_base(tmp_path / "base", "no/such")


@pytest.mark.parametrize("name", ["CogVideoX.pt", "CogVideoX.bin"])
def test_a_pickled_base_is_refused_with_the_way_to_convert_it_and_without_another_networks_address(folder, name):
    with pytest.raises(ValueError, match=r"unpickling .* convert\.py") as error:
        Mirage.from_base(folder / name, folder / "vae_2d")
    assert "Wan" not in str(error.value)
    vae = folder / "base" / "vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="unpickling") as error:
        Mirage.from_base(folder / "base", folder / "vae_2d")
    assert "Wan" not in str(error.value)


def test_a_base_of_another_kind_is_refused_by_its_class(folder):
    config = folder / "base" / "vae" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"AutoencoderKLCogVideoX"', '["AutoencoderKLCogVideoX"]'))
    with pytest.raises(ValueError, match=r"config.json: wanted _class_name .*, got \['AutoencoderKLCogVideoX'\]"):
        Mirage.from_base(folder / "base", folder / "vae_2d")
    config.write_text(whole)
    config.write_text(config.read_text().replace("AutoencoderKLCogVideoX", "AutoencoderKL"))
    with pytest.raises(ValueError, match="config.json: wanted _class_name 'AutoencoderKLCogVideoX' or "
                                         "'AutoencoderKLWan', got 'AutoencoderKL'"):
        Mirage.from_base(folder / "base", folder / "vae_2d")


# ---- what a stage file may hold --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole folder, with both stages."""
    folder = tmp_path_factory.mktemp("whole")
    small.save_cogvideox(folder)
    mirage = Mirage.from_base(folder / "base", folder / "vae_2d")
    for name in (RECONSTRUCTION, TRANSFORMER, HARMONISATION):
        mirage.add_lora(name, 2, 2.0)
    weights.save_tensors(folder / "prompt.safetensors", {"text": mirage.text})
    bases = {"base": "base", "vae2d": "vae_2d"}
    mirage.save_stage(folder / "stage_a.safetensors", [RECONSTRUCTION], bases, fusion=True)
    mirage.save_stage(folder / "stage_h.safetensors", [TRANSFORMER, HARMONISATION], {"t": "199", "window": "5"})
    return folder


def refused(whole, file, *said, change=None, **about):
    """Loading the folder with another value in one file must end in one line that names the file and says `said`.

    change: {tensor: a number for all its elements, or a function of it}; about: the metadata's changes.
    """
    path = whole / file
    before = path.read_bytes()
    tensors, texts = weights.load_tensors(path)
    for key, value in (change or {}).items():
        tensors[key] = value(tensors[key]) if callable(value) else torch.full_like(tensors[key], value)
    weights.save_tensors(path, tensors, texts | about)
    try:
        with pytest.raises(ValueError, match="^[^\n]*$") as error:
            Mirage.from_pretrained(whole)
    finally:
        path.write_bytes(before)
    assert all(text in str(error.value) for text in (file, *said)), error.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file, key", [
    ("stage_a.safetensors", "fusion.0.weight"), ("stage_a.safetensors", "fusion.1.s_f"),
    ("stage_h.safetensors", "harmonisation.conv_in.conv.lora_B.weight"), ("prompt.safetensors", "text")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(whole, file, key, value):
    def change(tensor):
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed
    refused(whole, file, f"{key} is not finite (NaN or inf)", change={key: change})


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("file, key", [("stage_a.safetensors", "fusion.0.weight"), ("prompt.safetensors", "text")])
def test_tensors_of_another_kind_are_refused_by_name(whole, file, key, kind):
    refused(whole, file, f"{key}: wanted floating-point numbers of 16 bits or more, got {kind}",
            change={key: lambda tensor: tensor.to(kind)})


def test_scales_that_are_not_positive_and_a_lora_without_a_rank_are_refused(whole):
    for value in (0.0, -1.0):
        refused(whole, "stage_a.safetensors", f"fusion.1.s_h: wanted a positive scale, got {value}",
                change={"fusion.1.s_h": value})
    key = "reconstruction.conv_in.conv.lora_A.weight"
    refused(whole, "stage_a.safetensors", "LoRA 'reconstruction'", change={key: lambda A: A.sum()})


@pytest.mark.parametrize("field, value, wanted", [
    ("t", "-1", "an integer from 0 to 999"), ("t", "1000", "an integer from 0 to 999"), ("t", "x", "an integer"),
    ("window", "0", "from 1 to"), ("window", "5.0", "an integer"), ("system", "R3D2", "one of 'Mirage'"),
    ("transformer.alpha", "nan", "one finite number"), ("transformer.alpha", "inf", "one finite number"),
    ("transformer.alpha", "-2.0", "one finite number"), ("harmonisation.alpha", "0", "one finite number"),
    ("harmonisation.alpha", "1e9", "one finite number"), ("harmonisation.alpha", "much", "one finite number"),
    ("lora_adapter_metadata", "null", "an object"), ("lora_adapter_metadata", "[]", "an object"),
    ("lora_adapter_metadata", "{", "an object"), ("lora_adapter_metadata", "[" * 100_000, "an object"),
    ("lora_adapter_metadata", '{"transformer.target_modules": [1]}', "target_modules[0]: wanted text"),
    ("lora_adapter_metadata", '{"transformer.target_modules": "to_q"}', "target_modules: wanted a list"),
    ("lora_adapter_metadata", '{"transformer.lora_alpha": "4"}', "lora_alpha: wanted one finite number")])
def test_metadata_of_another_type_sign_or_size_is_refused_by_file_and_field(whole, field, value, wanted):
    refused(whole, "stage_h.safetensors", field, wanted, **{field: value})


def test_what_is_chosen_when_a_mirage_is_loaded_is_what_its_streams_use(whole):
    default = dict(window=5, tiles=1, margin=8, t=199, change_only=False)
    assert vars(Mirage.from_pretrained(whole)).items() >= default.items()
    assert Mirage.from_pretrained(whole, change_only=True).change_only
    mirage = Mirage.from_pretrained(whole, window=9, tiles=2, margin=0)
    x = clip(9, 32, 32)[0].unbind(1)
    wanted = Mirage.from_pretrained(whole).stream(x, window=9, tiles=2, margin=0)
    assert all(torch.equal(a, b) for a, b in zip(mirage.stream(x), wanted, strict=True))
