"""R3D2 and Difix against pipelines put together from diffusers' own modules; sizes, streams, files and refusals.

The pipelines here are written from what is known of R3D2's and Difix's wiring, not from the code.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as nnf

from mirage_min.networks import weights
from mirage_min.systems import r3d2
from mirage_min.systems.r3d2 import R3D2
from tests import small
from tests.torchvision_stub import stub

stub()
diffusers = pytest.importorskip("diffusers", reason="parity is measured against diffusers: pip install diffusers")
KINDS = pytest.mark.parametrize("kl", [True, False], ids=["AutoencoderKL", "AutoencoderTiny"])
PLACES = {  # diffusers' modules, finest first: whose input or output a feature is, and to whose a skip is added
    True: ([("encoder.down_blocks.0", "input"), ("encoder.down_blocks.1", "input"), ("encoder.down_blocks.2", "input"),
            ("encoder.down_blocks.3", "input")],
           [("decoder.up_blocks.3", "input"), ("decoder.up_blocks.2", "input"), ("decoder.up_blocks.1", "input"),
            ("decoder.up_blocks.0", "input")]),
    # conv, block | conv, block | conv, block | conv, block, conv; conv, relu, 3 x (block, upsample, conv), block, conv
    False: ([("encoder.layers.1", "output"), ("encoder.layers.3", "output"), ("encoder.layers.5", "output")],
            [("decoder.layers.10", "output"), ("decoder.layers.7", "output"), ("decoder.layers.4", "output")]),
}


def video(*shape, seed=1, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kl -> the folder of a small random system; its norms and biases are off their start values too."""
    made = {}
    for kl in (True, False):
        made[kl] = tmp_path_factory.mktemp("r3d2")
        small_r3d2(kl).save_pretrained(made[kl])
    return made


def small_r3d2(kl: bool) -> R3D2:
    system = small.r3d2(kl).double()
    draws = torch.Generator().manual_seed(3)
    for p in [*system.unet.parameters(), *system.vae.parameters()]:
        p.add_(torch.randn(p.shape, generator=draws, dtype=p.dtype) * (0.2 if p.ndim == 1 else 0.02))
    return system


class Published:
    """The pipeline put together from diffusers: image after image, skips by hooks, z0 by DDPMScheduler."""

    def __init__(self, folder: Path, kl: bool, vae=None):
        VAE = diffusers.AutoencoderKL if kl else diffusers.AutoencoderTiny
        self.kl, self.vae = kl, vae or VAE.from_pretrained(folder / "vae", torch_dtype=torch.float64)
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float64)
        self.text = weights.load_tensors(folder / "prompt.safetensors")[0]["text"].double()
        state = weights.load_tensors(folder / "vae" / weights.WEIGHTS)[0]
        n = 4 if kl else 3
        self.convs = [state.get(f"decoder.skip_conv_{k}.weight") for k in range(n, 0, -1)]  # finest first
        self.scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                                 clip_sample=False)
        self.scheduler.set_timesteps(timesteps=[199])
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        self.scheduler.alphas_cumprod = (1 - betas).cumprod(0)  # its own are in float32
        self.features = []
        for k, ((source, how), (target, where)) in enumerate(zip(*PLACES[kl])):
            self.watch(self.vae.get_submodule(source), how)
            self.add(self.vae.get_submodule(target), where, k)

    def watch(self, module, how):
        if how == "input":
            module.register_forward_pre_hook(lambda m, given: self.features.append(given[0]))
        else:
            module.register_forward_hook(lambda m, given, out: self.features.append(out))

    def add(self, module, where, k):
        def more(x):
            return x + nnf.conv2d(self.features[k], self.convs[k])
        if where == "input":
            module.register_forward_pre_hook(lambda m, given: (more(given[0]), *given[1:]))
        else:
            module.register_forward_hook(lambda m, given, out: more(out))

    @torch.no_grad()
    def encode(self, x):
        H, W = x.shape[-2:]
        x = torch.cat([x, x[..., -1:, :].repeat(1, 1, -H % 8, 1)], dim=-2)
        x = torch.cat([x, x[..., -1:].repeat(1, 1, 1, -W % 8)], dim=-1)
        self.features = []
        z = self.vae.encode(x).latent_dist.mean if self.kl else self.vae.encode(x).latents
        return z * self.vae.config.scaling_factor

    @torch.no_grad()
    def __call__(self, image, reference=None):
        """image [3, H, W] -> the same"""
        z_ref = None if reference is None else self.encode(reference[None])
        z = self.encode(image[None])
        if z_ref is not None:
            z = torch.cat([z, z_ref])
        eps = self.unet(z, 199, self.text.expand(len(z), -1, -1)).sample
        z0 = self.scheduler.step(eps, 199, z).pred_original_sample[:1]
        y = self.vae.decode(z0 / self.vae.config.scaling_factor).sample
        return y[0, :, : image.shape[1], : image.shape[2]]


def assert_close(ours, theirs, of_std=1e-9):
    assert ours.shape == theirs.shape, f"{list(ours.shape)}, wanted {list(theirs.shape)}"
    difference, allowed = (ours - theirs).abs().max().item(), of_std * theirs.std().item()
    assert difference <= allowed, f"largest difference {difference:.1e}, allowed {allowed:.1e}"


# ---- against the published networks ----------------------------------------------------------------------------------

@KINDS
@pytest.mark.parametrize("H, W", [(16, 24), (41, 57), (8, 8), (17, 130)])
def test_every_frame_is_what_the_published_modules_make_of_it(folders, kl, H, W):
    ours, theirs = R3D2.from_pretrained(folders[kl]), Published(folders[kl], kl)
    x = video(2, 3, 2, H, W)
    with torch.no_grad(), small.unchanged(x):
        y = ours(x)
    wanted = torch.stack([torch.stack([theirs(image) for image in clip.unbind(1)], dim=1) for clip in x])
    assert_close(y, wanted)


def test_the_timestep_is_the_folders_or_the_one_given(folders):
    ours, theirs = R3D2.from_pretrained(folders[True], t=999), Published(folders[True], True)
    assert R3D2.from_pretrained(folders[True]).t == 199 and ours.t == 999
    x = video(1, 3, 1, 16, 16)
    z = theirs.encode(x[:, :, 0])
    alpha = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).prod()
    with torch.no_grad():
        eps = theirs.unet(z, 999, theirs.text).sample
        assert_close(ours.denoise(z), (z - (1 - alpha).sqrt() * eps) / alpha.sqrt(), 1e-9)


@pytest.fixture(scope="module")
def difix(folders, tmp_path_factory):
    """(a folder as nvidia/difix has it, its VAE wrapped by PEFT): no prompt and no t, a LoRA in the decoder."""
    peft = pytest.importorskip("peft", reason="needs the package peft")
    folder = tmp_path_factory.mktemp("difix")
    shutil.copytree(folders[True], folder, dirs_exist_ok=True)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float64)
    state = weights.load_tensors(folder / "vae" / weights.WEIGHTS)[0]
    for key in [key for key in state if "skip_conv" in key]:
        name = key.removeprefix("decoder.").removesuffix(".weight")
        conv = torch.nn.Conv2d(*state[key].shape[1::-1], 1, bias=False).double()
        conv.weight.data.copy_(state[key])
        vae.decoder.add_module(name, conv)
    targets = [f"decoder.{name}" for name, m in vae.decoder.named_modules()
               if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    config = peft.LoraConfig(r=4, init_lora_weights="gaussian", target_modules=targets)  # names no alpha
    vae = peft.inject_adapter_in_model(config, vae, adapter_name="vae_skip").double().eval()
    torch.manual_seed(5)
    for name, p in vae.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.05)
    weights.save_tensors(folder / "vae" / weights.WEIGHTS, vae.state_dict())
    fields = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(fields | {"lora_rank": 4, "gamma": 1.0}))
    (folder / "prompt.safetensors").rename(folder.parent / "difix_prompt.safetensors")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "DifixPipeline", "_diffusers_version": "0.25.1", "feature_extractor": [None, None],
        "requires_safety_checker": True, "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["autoencoder_kl", "AutoencoderKL"]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "DDPMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1}))
    return folder, vae


def published_difix(folder, vae, monkeypatch, views=1):
    """Difix's pipeline, its VAE still wrapped, its skips PEFT's own layers."""
    (folder / "prompt.safetensors").write_bytes((folder.parent / "difix_prompt.safetensors").read_bytes())
    vae = copy.deepcopy(vae)  # hooks stay on a module
    theirs = Published(folder, True, vae=vae)
    (folder / "prompt.safetensors").unlink()
    theirs.convs = [vae.decoder.get_submodule(f"skip_conv_{k}") for k in (4, 3, 2, 1)]
    monkeypatch.setattr(nnf, "conv2d", lambda x, conv, *more, f=nnf.conv2d, **named: (
        conv(x) if isinstance(conv, torch.nn.Module) else f(x, conv, *more, **named)))
    if views == 2:
        for block in (m for m in theirs.unet.modules() if type(m).__name__ == "BasicTransformerBlock"):
            block.forward = two_views(block)
    return theirs


def two_views(block):
    """Difix's mv_unet, in our words: self-attention sees both images' tokens in one row."""
    def forward(x, attention_mask=None, encoder_hidden_states=None, **_):
        both = torch.cat([x[:1], x[1:]], dim=1)
        both = both + block.attn1(block.norm1(both))
        x = torch.cat(both.chunk(2, dim=1))
        x = x + block.attn2(block.norm2(x), encoder_hidden_states)
        return x + block.ff(block.norm3(x))
    return forward


@pytest.mark.parametrize("views", [1, 2])
def test_difixs_folder_is_read_as_it_is_its_lora_merged_and_a_reference_is_its_second_view(difix, monkeypatch, views):
    folder, vae = difix
    ours = R3D2.from_pretrained(folder, prompt=folder.parent / "difix_prompt.safetensors")
    theirs = published_difix(folder, vae, monkeypatch, views)
    x, reference = video(1, 3, 2, 24, 43), video(3, 24, 43, seed=7) if views == 2 else None
    with torch.no_grad():
        y = ours(x, reference)
    wanted = torch.stack([theirs(image, reference) for image in x[0].unbind(1)], dim=1)[None]
    assert_close(y, wanted)
    if views == 2:
        streamed = torch.stack(list(ours.stream(x[0].unbind(1), 2, reference)), dim=1)
        assert (streamed - y[0].clamp(-1, 1)).abs().max() < 1e-6
        with torch.no_grad():
            assert (ours(x) - y).abs().max() > 1e-3 * y.std(), "without it the result is another"
    assert ours.t == 199


# ---- sizes and streams -----------------------------------------------------------------------------------------------

@KINDS
@pytest.mark.parametrize("T, H, W, batch", [(5, 41, 57, 2), (1, 16, 16, 4), (4, 8, 9, 4), (3, 1, 1, 1)])
def test_a_stream_in_batches_equals_the_call_at_any_size_and_length(kl, T, H, W, batch):
    system, x = small.r3d2(kl).double(), video(1, 3, T, H, W)
    for p in system.vae.decoder.parameters():
        p.mul_(1.5)
    with torch.no_grad():
        y = system(x)[0]
    frames = list(system.stream(iter(x[0].float().unbind(1)), batch))
    assert len(frames) == T and all(frame.shape == (3, H, W) and frame.dtype == torch.float32 for frame in frames)
    difference = (torch.stack(frames, dim=1) - y.clamp(-1, 1)).abs().max()
    assert difference < 1e-5, f"stream and call differ by {difference:.1e}"


def test_the_call_is_not_clamped_and_the_stream_is():
    system, x = small.r3d2(), video(1, 3, 1, 16, 16, dtype=torch.float32)
    system.vae.decoder.conv_out.weight.mul_(50)
    with torch.no_grad():
        y = system(x)
    assert y.abs().max() > 1.5 and torch.equal(next(system.stream(x[0].unbind(1))), y[0, :, 0].clamp(-1, 1))


def test_a_stream_asks_for_one_batch_at_a_time_and_nothing_stays_on_a_module():
    system, asked = small.r3d2(), []

    def frames():
        for t in range(7):
            asked.append(t)
            yield torch.full((3, 16, 16), t / 10)
    before = {name: set(vars(module)) for name, module in system.named_modules()}
    stream = system.stream(frames(), batch=3)
    next(stream)
    assert asked == [0, 1, 2]
    assert len(list(stream)) == 6
    assert before == {name: set(vars(module)) for name, module in system.named_modules()}, "something was kept"


def test_a_frame_is_the_same_whatever_comes_before_it():
    system, x = small.r3d2(), video(1, 3, 3, 24, 16, dtype=torch.float32)
    others = video(1, 3, 3, 24, 16, seed=9, dtype=torch.float32)
    others[:, :, 1] = x[:, :, 1]
    with torch.no_grad():
        assert torch.equal(system(x)[:, :, 1], system(others)[:, :, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_half_precision(folders, dtype):
    whole, half = R3D2.from_pretrained(folders[True]), R3D2.from_pretrained(folders[True], dtype=dtype)
    x = video(1, 3, 1, 24, 32)
    with torch.no_grad():
        wanted, y = whole(x), half(x.to(dtype))
    rms = ((y.double() - wanted).square().mean().sqrt() / wanted.std()).item()
    assert y.dtype == dtype and rms < 0.1, f"RMS {rms:.1e} of the std"
    (frame,) = half.stream(x[0].float().unbind(1))
    assert frame.dtype == torch.float32


# ---- files -----------------------------------------------------------------------------------------------------------

@KINDS
def test_what_is_saved_is_read_again_and_the_index_says_what_it_is(kl, tmp_path):
    system = small.r3d2(kl)
    system.t = 250
    system.save_pretrained(tmp_path, {"step": 3})
    again = R3D2.from_pretrained(tmp_path)
    assert again.t == 250 and type(again.vae) is type(system.vae)
    mine, its = system.state_dict(), again.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
    assert torch.equal(again.alpha_bar, system.alpha_bar) and not any(p.requires_grad for p in again.parameters())
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert r3d2.describes(index) and index["_class_name"] == "R3D2" and index["step"] == 3
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", system.vae.CLASS_NAME]
    assert not r3d2.describes({"_class_name": "Harmonizer", "vae": "vae"})
    index.pop("t")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model_index.json: says no timestep t, and that of a R3D2 is not known"):
        R3D2.from_pretrained(tmp_path)
    assert R3D2.from_pretrained(tmp_path, t=999).t == 999


@pytest.mark.parametrize("start", [0.0, 1e-5])
def test_a_base_with_any_vae_gets_new_skips_and_a_trained_system_keeps_its_own(folders, tmp_path, start):
    tiny = tmp_path / "taesd"
    small.r3d2(kl=False).vae.save_pretrained(tiny)
    system = R3D2.from_base(folders[True], tiny, start=start, dtype=torch.float64)
    new = list(system.skips.parameters())
    assert len(new) == 3 and all((p.float() == start).all() for p in new)
    assert list(system.text.shape) == [1, 1, 12] and system.text.abs().max() == 0
    x = video(1, 3, 1, 16, 16)
    with torch.no_grad():
        plain = system.vae.decode(system.denoise(system.vae.encode(x[:, :, 0])))
        assert torch.equal(system(x)[:, :, 0], plain) is (start == 0)
    kept, own = R3D2.from_base(folders[True], start=start), R3D2.from_pretrained(folders[True])
    assert all(torch.equal(a, b) for a, b in zip(kept.skips.parameters(), own.skips.parameters()))
    assert all(p.requires_grad for p in kept.parameters())


# ---- what is refused -------------------------------------------------------------------------------------------------

def changed(folder: Path, to: Path, file: str, **fields) -> Path:
    """A copy of a system's folder in which some fields of one JSON file are others; None: gone."""
    shutil.copytree(folder, to)
    content = json.loads((to / file).read_text()) | fields
    (to / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return to


@pytest.mark.parametrize("file, fields, message", [
    ("model_index.json", {"vae": ["r3d2", "SkipVAE"]},
     r"model_index.json: vae: wanted the class AutoencoderKL or AutoencoderTiny, got \['r3d2', 'SkipVAE'\]"),
    ("model_index.json", {"unet": ["diffusers", "SD3Transformer2DModel"]},
     "model_index.json: unet: wanted the class UNet2DConditionModel, got"),
    ("model_index.json", {"unet": None}, "model_index.json: unet: wanted a list"),
    ("model_index.json", {"t": 1000}, "model_index.json: t: wanted an integer from 0 to 999"),
    ("vae/config.json", {"_class_name": "SkipVAE"}, "config.json: _class_name: wanted AutoencoderKL or .*'SkipVAE'"),
    ("vae/config.json", {"_class_name": ["AutoencoderKL"]}, r"_class_name: wanted .*, got \['AutoencoderKL'\]"),
    ("vae/config.json", {"gamma": 0.5}, "config.json: gamma: wanted 1.0, got 0.5"),
    ("vae/config.json", {"use_skips": True}, "config.json: AutoencoderKL does not know the field use_skips"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "scheduler_config.json: prediction_type"),
    ("scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler", "clip_sample": None},
     "scheduler_config.json: clip_sample")])
def test_a_folder_that_says_something_else_is_refused_with_the_file_and_what_was_wanted(folders, tmp_path, file, fields,
                                                                                        message):
    with pytest.raises(ValueError, match=message):
        R3D2.from_pretrained(changed(folders[True], tmp_path / "a", file, **fields))


def test_whole_numbers_and_nan_among_the_vaes_weights_are_named(folders, tmp_path):
    file = Path(shutil.copytree(folders[True], tmp_path / "a")) / "vae" / weights.WEIGHTS
    state = weights.load_tensors(file)[0]
    for name in ("decoder.conv_in.bias", "decoder.skip_conv_1.weight"):
        for spoilt in (state[name].long(), torch.full_like(state[name], torch.nan)):
            weights.save_tensors(file, state | {name: spoilt})
            with pytest.raises(ValueError, match=f"{name.removeprefix('decoder.')}(: wanted floating| is not finite)"):
                R3D2.from_pretrained(tmp_path / "a")


def test_a_base_without_skips_is_no_system_and_a_folder_without_a_prompt_says_how_to_make_one(folders, tmp_path):
    folder = Path(shutil.copytree(folders[True], tmp_path / "a"))
    small.r3d2().double().vae.save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match=r"vae/diffusion.*: wanted skip convolutions in the decoder.*train_r3d2.py"):
        R3D2.from_pretrained(folder)
    (folder / "prompt.safetensors").unlink()
    with pytest.raises(ValueError, match=r"prompt.safetensors: no such file; python encode_prompt.py --base .*a --out"):
        R3D2.from_pretrained(folder)
    with pytest.raises(ValueError, match="gone.safetensors: no such file"):
        R3D2.from_pretrained(folder, prompt=tmp_path / "gone.safetensors")
    weights.save_tensors(folder / "prompt.safetensors", {"embedding": torch.zeros(1, 7, 12)})
    with pytest.raises(ValueError, match="prompt.safetensors: wanted a tensor `text`"):
        R3D2.from_pretrained(folder)


def test_a_unet_or_a_prompt_for_another_model_is_refused_by_its_numbers(folders, tmp_path):
    with pytest.raises(ValueError, match="UNet for the 4 latent channels of this VAE, got one that takes 9 and"):
        small.r3d2(in_channels=9)
    weights.save_tensors(tmp_path / "prompt.safetensors", {"text": torch.zeros(1, 77, 1024)})
    with pytest.raises(ValueError, match=r"prompt \[1, L, 12\], as wide as this UNet takes it, got \[1, 77, 1024\]"):
        R3D2.from_pretrained(folders[True], prompt=tmp_path / "prompt.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("decoder.conv_in.lora_A.vae_skip.weight"), r"diffusion.*1 layers .*decoder.conv_in"),
    (lambda state: state.pop("decoder.conv_in.lora_B.vae_skip.weight"), r"diffusion.*1 layers .*decoder.conv_in"),
    (lambda state: state.pop("decoder.skip_conv_2.base_layer.weight"), r"diffusion.*1 layers .*skip_conv_2"),
    (lambda state: [state.pop(key) for key in list(state) if "skip_conv_4" in key], "1 missing: skip_conv_4.weight"),
    (lambda state: state.update({"decoder.mixer.weight": torch.zeros(1)}), "1 unexpected: decoder.mixer.weight")])
def test_a_lora_or_skips_that_are_not_whole_are_refused(difix, tmp_path, change, message):
    folder = Path(shutil.copytree(difix[0], tmp_path / "difix"))
    state = weights.load_tensors(folder / "vae" / weights.WEIGHTS)[0]
    change(state)
    weights.save_tensors(folder / "vae" / weights.WEIGHTS, state)
    with pytest.raises(ValueError, match=message):
        R3D2.from_pretrained(folder, prompt=difix[0].parent / "difix_prompt.safetensors")


def test_a_pickle_is_refused_and_convert_named_as_is_what_is_no_folder(tmp_path):
    (tmp_path / "difix.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="difix.pkl: not loaded, .*convert.py"):
        R3D2.from_pretrained(tmp_path / "difix.pkl")
    with pytest.raises(ValueError, match="no model_index.json in"):
        R3D2.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such folder, and not a hub id"):
        R3D2.from_pretrained(tmp_path / "gone")


def test_frames_and_references_of_another_size_are_refused_by_their_shapes():
    system, frames = small.r3d2(), [torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), torch.zeros(3, 16, 24)]
    with pytest.raises(ValueError, match=r"frame 2: wanted \[3, 16, 16\] as the frames before it, got \[3, 16, 24\]"):
        list(system.stream(frames, batch=2))
    with pytest.raises(ValueError, match=r"reference .* frames' shape \[3, 16, 16\], got \[3, 24, 16\]"):
        list(system.stream(frames[:1], reference=torch.zeros(3, 24, 16)))
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        list(system.stream(frames, batch=0))
    with pytest.raises(ValueError, match=r"wanted \[B, 3, T, H, W\], got \[3, 16, 16\]"):
        system(frames[0])
