"""UNet2DConditionModel against diffusers' own, live, on small random weights and on the official configs.

In float64 both must agree to 1e-9 of the output's std: a norm with another's epsilon differs by 1e-5 only.
"""

import pytest
import torch

from mirage_min.networks.unet_2d import UNet2D, UNet2DConfig
from mirage_min.networks.weights import read_config
from tests.torchvision_stub import stub

stub()
diffusers = pytest.importorskip("diffusers", reason="parity is measured against diffusers: pip install diffusers")
from diffusers.models.attention import BasicTransformerBlock  # noqa: E402

SMALL = {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 24, "layers_per_block": 2}
KINDS = {  # heads differ by stage, and from channels / 64
    "linear": {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True},
    "conv": {"attention_head_dim": 2},
    "two stages": {"attention_head_dim": (2, 4), "use_linear_projection": True, "block_out_channels": (16, 32),
                   "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1,
                   "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
}
SIZES = [(1, 8, 16), (2, 17, 15), (1, 9, 24), (1, 3, 5), (1, 1, 1), (3, 16, 16), (1, 135, 30)]  # N, h, w
TIGHT = 1e-9


def published(kind="linear", **changes):
    """diffusers' UNet, small and random, in float64; norms and biases too are off their start values."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**SMALL | KINDS[kind] | changes).double().eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.02))
    return unet


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """kind -> (diffusers' UNet, ours loaded from what diffusers saved)"""
    made = {}
    for kind in KINDS:
        folder, theirs = tmp_path_factory.mktemp("unet"), published(kind)
        theirs.save_pretrained(folder)
        made[kind] = theirs, UNet2D.from_pretrained(folder)
    return made


def inputs(N, h, w, L=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    z, text = torch.randn(N, 4, h, w, generator=generator), torch.randn(N, L, 24, generator=generator)
    return z.to(dtype), text.to(dtype)


def assert_equal_in_float64(what, ours, theirs, of_std=TIGHT):
    difference, tolerance = (ours - theirs).abs().max().item(), of_std * theirs.std().item()
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)}, diffusers {list(theirs.shape)}"
    assert difference <= tolerance, f"{what}: largest difference {difference:.1e}, tolerance {tolerance:.1e}"


@pytest.mark.parametrize("kind, N, h, w", [(kind, *size) for kind in KINDS for size in SIZES
                                           if kind == "linear" or size[1] < 100])
@torch.no_grad()
def test_the_prediction_equals_the_published_one_at_any_size(pairs, kind, N, h, w):
    theirs, ours = pairs[kind]
    z, text = inputs(N, h, w)
    assert_equal_in_float64("ε", ours(z, 199, text), theirs(z, 199, text).sample)


@pytest.mark.parametrize("t", [0, 999, torch.tensor(199), torch.tensor([640, 199])], ids=str)
@torch.no_grad()
def test_a_timestep_may_be_a_number_or_one_for_each_image(pairs, t):
    theirs, ours = pairs["linear"]
    z, text = inputs(2, 9, 12)
    assert_equal_in_float64(f"t = {t}", ours(z, t, text), theirs(z, t, text).sample)


@pytest.mark.parametrize("L", [1, 77])
@torch.no_grad()
def test_a_text_may_have_any_number_of_tokens(pairs, L):
    theirs, ours = pairs["conv"]
    z, text = inputs(2, 9, 12, L)
    assert_equal_in_float64(f"{L} tokens", ours(z, 199, text), theirs(z, 199, text).sample)


@torch.no_grad()
def test_norms_of_hardly_any_contrast_are_the_published_ones(pairs):
    """Where the variance is that of the norms' epsilon, which decides then."""
    theirs, ours = pairs["linear"]
    norms = {n: m for n, m in theirs.named_modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))}
    assert len(norms) == 2 * 22 + 16 + 3 * 16 + 1  # resnet blocks, transformers, their blocks, the last
    for name, norm in norms.items():
        channels = norm.num_channels if isinstance(norm, torch.nn.GroupNorm) else norm.normalized_shape[0]
        x = 1e-3 * torch.randn(2, 15, channels, dtype=torch.float64)
        x = x.mT if isinstance(norm, torch.nn.GroupNorm) else x
        assert_equal_in_float64(name, ours.get_submodule(name)(x), norm(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_of_latent_and_text_equal_the_published_ones(pairs, kind):
    theirs, ours = pairs[kind]
    z, text = (v.requires_grad_() for v in inputs(2, 11, 6))
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    wanted = torch.autograd.grad((theirs(z, 199, text).sample * weight).sum(), (z, text))
    given = torch.autograd.grad((ours(z, 199, text) * weight).sum(), (z, text))
    for name, a, b in zip(("z", "text"), given, wanted):
        assert_equal_in_float64(f"gradient of {name}", a, b)


@torch.no_grad()
def test_two_views_attend_to_each_others_tokens(pairs, monkeypatch):
    """Against diffusers' block with its self-attention written over all views' tokens, "(b v)"."""
    theirs, ours = pairs["linear"]
    z, text = inputs(4, 9, 6)
    alone = ours(z, 199, text)

    def over_both_views(block, x, encoder_hidden_states=None, **_):
        pairs_of_views = []
        for first in range(0, len(x), 2):
            tokens = torch.cat([x[first], x[first + 1]])[None]
            tokens = tokens + block.attn1(block.norm1(tokens))
            pairs_of_views += tokens[0].split(len(x[first]))
        x = torch.stack(pairs_of_views)
        x = x + block.attn2(block.norm2(x), encoder_hidden_states)
        return x + block.ff(block.norm3(x))

    monkeypatch.setattr(BasicTransformerBlock, "forward", over_both_views)
    together = ours(z, 199, text, views=2)
    assert_equal_in_float64("two views", together, theirs(z, 199, text).sample)
    assert (together - alone).abs().max() > 1e-3 * alone.std(), "the views must matter for this to prove anything"
    for b in range(2):  # scenes keep to themselves, and the order of a scene's views says nothing
        scene = slice(2 * b, 2 * b + 2)
        swapped = ours(z[scene].flip(0), 199, text[scene].flip(0), views=2).flip(0)
        assert_equal_in_float64("views swapped", swapped, together[scene])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_rounds_no_more_than_the_published_one(dtype):
    theirs = published("linear")
    ours = UNet2D(read_config(UNet2D, dict(theirs.config) | {"_class_name": "UNet2DConditionModel"}, "theirs"))
    ours.load_state_dict(theirs.state_dict())
    z, text = inputs(2, 17, 15)
    wanted = theirs(z, 199, text).sample
    theirs, ours = theirs.to(dtype), ours.to(dtype).eval()
    given, publisheds = ours(z.to(dtype), 199, text.to(dtype)), theirs(z.to(dtype), 199, text.to(dtype)).sample
    assert given.dtype == dtype
    rms, rms_published = (((v.double() - wanted).square().mean().sqrt() / wanted.std()).item()
                          for v in (given, publisheds))
    assert rms <= 1.25 * rms_published < 0.05, f"RMS {rms:.1e} of the std, diffusers' own {rms_published:.1e}"


@torch.no_grad()
def test_float32_stays_within_1e_5_rms_of_the_published_float32():
    theirs = published("conv").float()
    ours = UNet2D(read_config(UNet2D, dict(theirs.config) | {"_class_name": "UNet2DConditionModel"}, "theirs"))
    ours.load_state_dict(theirs.state_dict())
    z, text = inputs(2, 17, 15, dtype=torch.float32)
    wanted = theirs(z, 999, text).sample
    rms = ((ours(z, 999, text) - wanted).square().mean().sqrt() / wanted.std()).item()
    assert rms <= 1e-5, f"RMS difference {rms:.1e} of the std, allowed 1e-5"


def test_activation_checkpointing_changes_no_gradient_and_holds_less(pairs):
    ours = pairs["linear"][1]
    z, text = inputs(2, 9, 12)
    held = {}

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        ours.activation_checkpointing = checkpointing
        seen = held.setdefault(checkpointing, set())
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.add(x.data_ptr()) or x, lambda x: x):
            loss = ours(z, 199, text, views=2).square().mean()
        return torch.autograd.grad(loss, list(ours.parameters()))

    plain, checkpointed = gradients(False), gradients(True)
    ours.activation_checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))
    assert len(held[True]) < len(held[False]) / 2, f"{len(held[False])} tensors held without, {len(held[True])} with"


def test_what_is_saved_here_loads_in_diffusers(tmp_path):
    torch.manual_seed(0)
    ours = UNet2D(UNet2DConfig(**SMALL | KINDS["linear"])).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    z, text = inputs(1, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(z, 199, text), theirs(z, 199, text).sample, rtol=0, atol=1e-5)


SD_15 = {  # as published with diffusers 0.6: eighteen fields
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8, "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
SD_21 = SD_15 | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
                 "dual_cross_attention": False, "only_cross_attention": False, "num_class_embeds": None}
SD_TURBO = SD_21 | {  # complete, as diffusers 0.24 writes it
    "addition_embed_type": None, "addition_embed_type_num_heads": 64, "addition_time_embed_dim": None,
    "attention_type": "default", "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "cross_attention_norm": None, "dropout": 0.0, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None, "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "time_cond_proj_dim": None,
    "reverse_transformer_layers_per_block": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
    "time_embedding_type": "positional", "timestep_post_act": None, "transformer_layers_per_block": 1,
    "upcast_attention": None}


@pytest.mark.parametrize("config, parameters", [(SD_15, 859_520_964), (SD_21, 865_910_724), (SD_TURBO, 865_910_724)],
                         ids=["sd-1.5", "sd-2.1", "sd-turbo"])
def test_official_configs_build_the_published_keys_and_shapes(config, parameters):
    with torch.device("meta"):
        ours = UNet2D(read_config(UNet2D, config, "config.json")).state_dict()
        theirs = diffusers.UNet2DConditionModel.from_config(config).state_dict()
    shapes = [{key: tuple(tensor.shape) for key, tensor in state.items()} for state in (ours, theirs)]
    assert shapes[0] == shapes[1], f"differ at {sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:5]}"
    assert len(ours) == 686 and sum(tensor.numel() for tensor in ours.values()) == parameters


@pytest.mark.parametrize("name, value", [
    ("act_fn", "gelu"), ("flip_sin_to_cos", False), ("freq_shift", 1), ("dual_cross_attention", True),
    ("transformer_layers_per_block", [1, 2, 10]), ("addition_embed_type", "text_time"), ("num_attention_heads", 8),
    ("resnet_time_scale_shift", "scale_shift"), ("class_embed_type", "timestep"), ("norm_type", "ada")])
def test_a_field_that_would_change_the_result_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        read_config(UNet2D, SD_TURBO | {name: value}, "config.json")


@pytest.mark.parametrize("changes, message", [
    ({"down_block_types": ("AttnDownBlock2D",) * 4}, "down_block_types must be 4 of.*AttnDownBlock2D"),
    ({"up_block_types": ("UpBlock2D",) * 3}, "up_block_types must be 4 of"),
    ({"attention_head_dim": (5, 10)}, r"attention_head_dim must be one number or 4, got \[5, 10\]"),
    ({"attention_head_dim": 7}, "attention_head_dim: wanted a number of heads that divides .* channels, got 7"),
    ({"attention_head_dim": 0}, "attention_head_dim: wanted a number of heads that divides .* channels, got 0")])
def test_other_stages_than_these_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet2D(UNet2DConfig(**SMALL | changes))


def test_wrong_inputs_are_refused_by_shape(pairs):
    ours = pairs["linear"][1]
    z, text = inputs(3, 4, 4)
    with pytest.raises(ValueError, match=r"z must be \[N, 4, h, w\], got \[4, 3, 4, 4\]"):
        ours(z.transpose(0, 1), 199, text)
    with pytest.raises(ValueError, match=r"cross_attention_dim=24.*got \[1, 7, 24\]"):
        ours(z, 199, text[:1])
    with pytest.raises(ValueError, match="3 images are not groups of 2 views"):
        ours(z, 199, text, views=2)
