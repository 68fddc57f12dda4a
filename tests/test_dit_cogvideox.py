"""The CogVideoX transformer against the published one, live, on small random models of its three shapes."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mirage_min.networks.dit_cogvideox import CogVideoXDiT, CogVideoXDiTConfig, rotary_table
from tests.torchvision_stub import stub

stub()
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "shared" / "checkpoint_configs"
SMALL = {
    "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 24,
    "text_embed_dim": 20, "num_layers": 2, "max_text_seq_length": 5, "sample_width": 20, "sample_height": 12,
}
SHAPES = {
    "2b": {"use_rotary_positional_embeddings": False, "temporal_interpolation_scale": 1.5},
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
}
SIZES = [(1, 6, 8), (2, 12, 18), (3, 7, 9), (5, 8, 4), (3, 5, 20)]  # latents, rows, columns


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name -> the published model with random weights (float64), and ours read from the files it saves."""
    @cache
    def build(name: str) -> tuple:
        torch.manual_seed(0)
        theirs = CogVideoXTransformer3DModel(**SMALL | SHAPES[name]).double().eval()
        for parameter in theirs.parameters():
            # unit-scale weights: gates, attention and positions must all matter, or parity would prove little
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
            else:
                torch.nn.init.normal_(parameter, mean=parameter.detach().mean().round().item(), std=0.3)
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder)
        return theirs, CogVideoXDiT.from_pretrained(folder, dtype=torch.float64).eval()
    return build


def published(model, z, t, text):
    """What the published pipeline computes around the published model, on latents padded as ours pads them."""
    n, h, w = z.shape[2:]
    c = model.config
    z = torch.cat([z, z[..., -1:]], dim=-1) if w % 2 else z
    z = torch.cat([z, z[..., -1:, :]], dim=-2) if h % 2 else z
    if c.patch_size_t and n % 2:
        z = torch.cat([z[:, :, :1], z], dim=2)
    rotary = None
    if c.use_rotary_positional_embeddings:
        pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
        rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipeline, z.shape[3] * 8, z.shape[4] * 8, z.shape[2], torch.device("cpu"))
    y = model(z.transpose(1, 2), text, t, image_rotary_emb=rotary, return_dict=False)[0].transpose(1, 2)
    return y[:, :, -n:, :h, :w]


def inputs(size, B=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(B, 4, *size, generator=generator, dtype=torch.float64)
    text = torch.randn(B, 5, 20, generator=generator, dtype=torch.float64)
    return z.to(dtype), torch.tensor([199, 640])[:B], text.to(dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_prediction_equals_the_published_models(pair, name, size):
    theirs, ours = pair(name)
    z, t, text = inputs(size)
    with torch.no_grad():
        want, got = published(theirs, z, t, text), ours(z, t, text)
    assert got.shape == z.shape
    error = ((got - want).abs().max() / want.std()).item()
    assert error <= 1e-5, f"{name} {size}: largest difference {error:.1e} of the std of diffusers' output, allowed 1e-5"


@pytest.mark.parametrize("name", SHAPES)
def test_float32_prediction_equals_the_published_models(pair, name):
    theirs, ours = pair(name)
    z, t, text = inputs((3, 7, 9), dtype=torch.float32)
    try:
        with torch.no_grad():
            want, got = published(theirs.float(), z, t, text), ours.float()(z, t, text)
    finally:
        theirs.double(), ours.double()
    rms = ((got - want).square().mean().sqrt() / want.std()).item()
    assert got.dtype == torch.float32
    assert rms <= 1e-5, f"{name}: RMS difference {rms:.1e} of the std of diffusers' output, allowed 1e-5"


@pytest.mark.parametrize("name", SHAPES)
def test_input_gradients_equal_the_published_models(pair, name):
    theirs, ours = pair(name)
    z, t, text = inputs((3, 7, 8))
    z.requires_grad_(), text.requires_grad_()
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    want = torch.autograd.grad((published(theirs, z, t, text) * weight).sum(), (z, text))
    got = torch.autograd.grad((ours(z, t, text) * weight).sum(), (z, text))
    for which, a, b in zip(("z_t", "text"), want, got):
        error = ((a - b).abs().max() / a.std()).item()
        assert error <= 1e-5, f"{name}: gradient of {which} differs by {error:.1e} of diffusers' std, allowed 1e-5"


@pytest.mark.parametrize("name", SHAPES)
def test_activation_checkpointing_changes_no_gradient(pair, name):
    ours = pair(name)[1]
    z, t, text = inputs((2, 6, 8))

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        ours.activation_checkpointing = checkpointing
        held = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.add(x.data_ptr()) or x, lambda x: x):
            loss = ours(z, t, text).square().mean()
        counts.append(len(held))
        return torch.autograd.grad(loss, list(ours.parameters()))

    counts: list[int] = []
    plain, checkpointed = gradients(False), gradients(True)
    ours.activation_checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))
    assert counts[1] < counts[0] / 2, f"tensors held for backward: {counts[0]} without, {counts[1]} with checkpointing"


def test_bfloat16_stays_near_float32(pair):
    ours = pair("5b")[1]
    z, t, text = inputs((3, 7, 9), dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            want, got = ours.float()(z.float(), t, text.float()), ours.bfloat16()(z, t, text)
    finally:
        ours.double()
    rms = ((got.float() - want).square().mean().sqrt() / want.std()).item()
    assert got.dtype == torch.bfloat16
    assert rms <= 0.03, f"RMS difference {rms:.3f} of the float32 output's std, allowed .03"


def test_an_integer_timestep_is_the_same_for_every_clip(pair):
    ours = pair("5b")[1]
    z, _, text = inputs((1, 4, 4))
    with torch.no_grad():
        assert torch.equal(ours(z, 199, text), ours(z, torch.tensor([199, 199]), text))
        assert not torch.allclose(ours(z, 199, text), ours(z, 200, text))
        alone = ours(z[1:], 199, text[1:])
        torch.testing.assert_close(ours(z, 199, text)[1:], alone, rtol=0, atol=1e-9)


def test_rotation_made_in_inference_mode_serves_training(pair):
    ours = pair("5b")[1]
    z, t, text = inputs((1, 4, 10))
    rotary_table.cache_clear()
    with torch.inference_mode():
        ours(z, t, text)
    ours(z, t, text).sum().backward()
    ours.zero_grad()


def test_wrong_inputs_are_refused_by_shape(pair):
    ours = pair("5b")[1]
    z, t, text = inputs((1, 4, 4))
    with pytest.raises(ValueError, match=r"z_t must be \[B, 4, F, h, w\], got \[2, 1, 4, 4, 4\]"):
        ours(z.transpose(1, 2), t, text)
    with pytest.raises(ValueError, match=r"max_text_seq_length=5.*got \[2, 4, 20\]"):
        ours(z, t, text[:, :4])


@pytest.mark.parametrize("field, change", [
    ("use_learned_positional_embeddings", {"use_rotary_positional_embeddings": True,
                                           "use_learned_positional_embeddings": True}),
    ("ofs_embed_dim", {"ofs_embed_dim": 16}),
    ("in_channels", {"in_channels": 8}),
])
def test_image_to_video_checkpoints_are_refused_by_field(tmp_path, field, change):
    CogVideoXTransformer3DModel(**SMALL | change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=field):
        CogVideoXDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b"])
def test_official_configs_build_the_published_keys_and_shapes(name):
    file = CONFIGS / f"{name}.transformer.json"
    if not file.exists():
        pytest.skip(f"needs {file.name} in ../shared/checkpoint_configs")
    published_config = json.loads(file.read_text())
    fields = {f.name for f in dataclasses.fields(CogVideoXDiTConfig)}
    explained = fields | set(CogVideoXDiT.FIXED) | CogVideoXDiT.IGNORED
    assert {k for k in published_config if not k.startswith("_")} <= explained
    with torch.device("meta"):
        ours = CogVideoXDiT(CogVideoXDiTConfig(**{k: v for k, v in published_config.items() if k in fields}))
        theirs = CogVideoXTransformer3DModel.from_config(published_config)
    want = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == want
