"""The Cosmos transformer against diffusers' on the same weights, in both layouts of its checkpoints.

The reference rounds its norms, its timestep embedding and its rotary tables to float32 even in a float64 model.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as nnf

from tests.torchvision_stub import stub

stub()

from diffusers import CosmosTransformer3DModel  # noqa: E402
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers  # noqa: E402
from diffusers.models.transformers.transformer_cosmos import CosmosRotaryPosEmbed  # noqa: E402

from mirage_min.networks import weights  # noqa: E402
from mirage_min.networks.dit_cosmos import NAMES, UNUSED, CosmosDiT, CosmosDiTConfig, rotary_table  # noqa: E402

SMALL = dict(in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=20, num_layers=3, mlp_ratio=4.0,
             text_embed_dim=12, adaln_lora_dim=6, max_size=(16, 64, 64), rope_scale=(1.0, 4.0, 4.0))
PREDICT2 = dict(concat_padding_mask=True, extra_pos_embed_type=None, patch_size=(1, 2, 2))  # not diffusers' defaults
SIZES = {"0.6B": dict(num_attention_heads=20, attention_head_dim=64, num_layers=20),
         "2B": dict(num_attention_heads=16, attention_head_dim=128, num_layers=28)}
OFFICIAL = dict(in_channels=16, out_channels=16, mlp_ratio=4.0, text_embed_dim=1024, adaln_lora_dim=256,
                max_size=(128, 240, 240), rope_scale=(1.0, 4.0, 4.0))


def randomise(model: nn.Module) -> None:
    """Weights that keep a signal's size; gates of a visible size and gains far enough from 1 to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.normal_(1, 0.3)
            else:
                p.normal_(std=p.shape[1] ** -0.5)


def save_published(folder, **change):
    model = CosmosTransformer3DModel(**SMALL | change, **PREDICT2)
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_published(tmp_path_factory.mktemp("cosmos_dit"))


def pair(folder, dtype):
    reference = CosmosTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval()
    return reference, CosmosDiT.from_pretrained(folder, dtype=dtype)


def inputs(B, n, h, w, dtype, L=7):
    """z, t with another value for each sample, text, and a padding mask of pixels that is nowhere 0."""
    torch.manual_seed(2)
    return (torch.randn(B, 4, n, h, w, dtype=dtype), torch.tensor([0.2, 0.731][:B], dtype=dtype),
            torch.randn(B, L, 12, dtype=dtype), torch.rand(1, 1, 8 * h, 8 * w, dtype=dtype) + 0.1)


def published(reference, z, t, text, mask):
    return reference(z, t, text, padding_mask=mask, return_dict=False)[0]


def close(ours, theirs, bound, rms=False):
    difference = (ours - theirs).double()
    size = difference.square().mean().sqrt() if rms else difference.abs().max()
    assert ours.shape == theirs.shape
    assert size <= bound * theirs.double().std(), f"difference {size:.2e}, bound {bound:.0e} of std {theirs.std():.2e}"


@pytest.mark.parametrize("each_frame", [False, True], ids=["one t", "a t for each latent frame"])
@pytest.mark.parametrize("B, n, h, w", [(1, 1, 2, 2), (2, 2, 6, 10), (1, 5, 4, 8), (2, 1, 8, 2)])
def test_matches_the_published_transformer(saved, B, n, h, w, each_frame):
    for dtype in (torch.float64, torch.float32):
        reference, dit = pair(saved, dtype)
        z, t, text, mask = inputs(B, n, h, w, dtype)
        t = torch.rand(B, 1, n, 1, 1).to(dtype) if each_frame else t
        with torch.no_grad():
            ours, theirs = dit(z, t, text, mask), published(reference, z, t, text, mask)
            close(ours, theirs, 1e-5)
            close(ours, theirs, 1e-6, rms=True)
            assert (dit(z, t, text) - ours).abs().max() > 0.01, "the padding mask must matter"


@pytest.mark.parametrize("head_dim", [12, 64])
def test_matches_where_time_rows_and_columns_share_a_head_otherwise(tmp_path, head_dim):
    reference, dit = pair(save_published(tmp_path, attention_head_dim=head_dim, num_layers=1), torch.float32)
    z, t, text, mask = inputs(2, 2, 4, 6, torch.float32)
    with torch.no_grad():
        close(dit(z, t, text, mask), published(reference, z, t, text, mask), 1e-5)


def test_no_text_is_exactly_null_text(saved):
    reference, dit = pair(saved, torch.float32)
    z, t, text, mask = inputs(2, 2, 6, 10, torch.float32)
    with torch.no_grad():
        without = dit(z, t, None, mask)
        assert torch.equal(without, dit(z, t, torch.zeros_like(text), mask))
        close(without, published(reference, z, t, torch.zeros_like(text), mask), 1e-5)
        assert (dit(z, t, text, mask) - without).abs().max() > 0.01, "a text must matter"


def test_a_network_without_cross_attention_computes_the_same_and_refuses_a_text(saved, tmp_path):
    dit = CosmosDiT.from_pretrained(saved)
    small = CosmosDiT(CosmosDiTConfig(**SMALL, cross_attention=False))
    small.load_state_dict({k: v for k, v in dit.state_dict().items() if ".attn2." not in k and ".norm2." not in k})
    small.save_pretrained(tmp_path)
    small, dit = CosmosDiT.from_pretrained(tmp_path).double(), dit.double()
    z, t, text, _ = inputs(1, 2, 4, 6, torch.float64)
    with torch.no_grad():
        close(small(z, t), dit(z, t), 1e-12)  # not to the bit: where weights lie in memory changes how some BLAS sum
    with pytest.raises(ValueError, match="text must be None.*cross_attention"):
        small(z, t, text)


@pytest.mark.parametrize("h, w", [(5, 7), (1, 3), (4, 5)])
def test_odd_sizes_are_filled_by_repetition(saved, h, w):
    reference, dit = pair(saved, torch.float32)
    z, t, text, _ = inputs(1, 2, h, w, torch.float32)
    filled = nnf.pad(z, (0, w % 2, 0, h % 2, 0, 0), mode="replicate")
    with torch.no_grad():
        theirs = published(reference, filled, t, text, torch.zeros(1, 1, 8, 8))
        close(dit(z, t, text), theirs[..., :h, :w], 1e-5)


def test_the_first_latents_alone_come_out_as_among_all(saved):
    dit = CosmosDiT.from_pretrained(saved, dtype=torch.float64)
    z, t, text, mask = inputs(2, 4, 4, 6, torch.float64)
    for t in (t, torch.rand(2, 1, 4, 1, 1, dtype=torch.float64)):
        modulations = dit.modulations(t, z.dtype)
        for text in (None, text):
            with torch.no_grad():
                whole = dit(z, t, text, mask)
                for n in (1, 3, 4):
                    close(dit.predict(z, modulations, text, mask, keep=n), whole[:, :, :n], 1e-12)


def test_a_number_for_t_serves_the_whole_batch(saved):
    dit = CosmosDiT.from_pretrained(saved, dtype=torch.float64)
    z, _, text, _ = inputs(2, 2, 4, 4, torch.float64)
    with torch.no_grad():
        ours = dit(z, 0.2, text)
        close(ours, dit(z, torch.tensor([0.2, 0.2]), text), 1e-12)
        close(ours, dit(z, torch.full((2, 1, 2, 1, 1), 0.2), text), 1e-12)
        assert (ours - dit(z, 0.21, text)).abs().max() > 1e-4


def test_the_norms_of_queries_and_keys_take_nvidias_eps_where_the_config_says_so(saved, tmp_path):
    reference, _ = pair(saved, torch.float64)
    for module in reference.modules():
        for name in ("norm_q", "norm_k"):
            if hasattr(module, name):
                getattr(module, name).eps = 1e-6
    dit = CosmosDiT.from_pretrained(saved, dtype=torch.float64)
    z, t, text, mask = inputs(1, 2, 4, 6, torch.float64)
    with torch.no_grad():
        theirs = published(reference, z, t, text, mask)
        assert (dit(z, t, text, mask) - theirs).abs().max() > 3e-6 * theirs.std(), "1e-5 and 1e-6 must differ"
        dit.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"qk_eps": 1e-6}))
        close(CosmosDiT.from_pretrained(tmp_path, dtype=torch.float64)(z, t, text, mask), theirs, 1e-6)


def test_gradients_match_the_published_ones(saved):
    reference, dit = pair(saved, torch.float64)
    z, t, text, mask = inputs(2, 2, 4, 6, torch.float64)
    z, text = z.requires_grad_(), text.requires_grad_()
    weight = torch.randn_like(z)
    theirs = torch.autograd.grad((published(reference, z, t, text, mask) * weight).sum(), (z, text))
    ours = torch.autograd.grad((dit(z, t, text, mask) * weight).sum(), (z, text))
    for a, b in zip(ours, theirs):
        close(a, b, 1e-5)


def test_activation_checkpointing_changes_neither_result_nor_gradients(saved):
    dit = CosmosDiT.from_pretrained(saved, dtype=torch.float64)
    z, t, text, _ = inputs(1, 2, 5, 4, torch.float64)
    results = []
    for dit.activation_checkpointing in (False, True):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            out = dit(z.requires_grad_(), t, text)
        results.append((out, torch.autograd.grad(out.square().sum(), [z, *dit.parameters()]), sum(held)))
    (out, grads, held), (out_again, grads_again, held_again) = results
    close(out_again, out, 1e-12)
    for a, b in zip(grads_again, grads):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    assert held_again < 0.3 * held, f"numbers kept for backward: {held_again} against {held}"


@pytest.mark.parametrize("grid, dim, scale", [((3, 4, 6), 64, (1.0, 4.0, 4.0)), ((1, 1, 1), 20, (1.0, 4.0, 4.0)),
                                              ((5, 2, 3), 128, (2.0, 3.0, 1.0))])
def test_rotary_tables_are_diffusers_own(grid, dim, scale):
    f, h, w = grid
    theirs = CosmosRotaryPosEmbed(dim, rope_scale=scale)(torch.zeros(1, 1, f, 2 * h, 2 * w))
    turn = rotary_table(grid, dim, scale, torch.device("cpu"))
    for ours, table in zip((turn.real, turn.imag), theirs):
        assert torch.equal(table[:, : dim // 2], table[:, dim // 2 :])
        difference = (ours - table[:, : dim // 2]).abs().max()
        assert difference <= 1e-6, f"largest difference {difference:.1e}"


def test_bfloat16_stays_within_three_percent_of_float32(saved):
    """Root-mean-square, relative to the output's std; both models have the weights rounded to bfloat16."""
    low = CosmosDiT.from_pretrained(saved, dtype=torch.bfloat16)
    high = CosmosDiT.from_pretrained(saved, dtype=torch.bfloat16).float()
    z, t, text, mask = (v.bfloat16() for v in inputs(2, 2, 4, 6, torch.float32))
    with torch.no_grad():
        out = low(z, t, text, mask)
        assert out.dtype == torch.bfloat16
        close(out.float(), high(z.float(), t.float(), text.float(), mask.float()), 3e-2, rms=True)


def test_every_linear_layer_is_called_so_that_an_adapter_on_it_works(saved):
    dit, called = CosmosDiT.from_pretrained(saved), set()
    linears = {name: m for name, m in dit.named_modules() if isinstance(m, nn.Linear)}
    for name, m in linears.items():
        m.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        dit(*inputs(1, 1, 2, 2, torch.float32))
    assert called == linears.keys()


def test_diffusers_reads_what_we_save(saved, tmp_path):
    dit = CosmosDiT.from_pretrained(saved)
    dit.save_pretrained(tmp_path)
    z, t, text, mask = inputs(1, 2, 4, 4, torch.float32)
    with torch.no_grad():
        theirs = published(CosmosTransformer3DModel.from_pretrained(tmp_path).eval(), z, t, text, mask)
        close(dit(z, t, text, mask), theirs, 1e-5)


# ---- NVIDIA's layout ------------------------------------------------------------------------------------------------


def nvidia_state(copy: str = "net.", **config) -> dict[str, torch.Tensor]:
    """A state dict as Cosmos-Predict2's repository has it, written from a list of its layers, on the default device.

    Norms are TransformerEngine's, so each has an `_extra_state` besides its weight.
    """
    c = SMALL | config
    d, D = c["attention_head_dim"], c["num_attention_heads"] * c["attention_head_dim"]
    rank, inner = c["adaln_lora_dim"], int(c["mlp_ratio"] * D)
    shapes = {"x_embedder.proj.1.weight": (D, 4 * (c["in_channels"] + 1)),
              "t_embedder.1.linear_1.weight": (D, D), "t_embedder.1.linear_2.weight": (3 * D, D),
              "t_embedding_norm.weight": (D,), "t_embedding_norm._extra_state": (0,),
              "final_layer.linear.weight": (4 * c["out_channels"], D),
              "final_layer.adaln_modulation.1.weight": (rank, D),
              "final_layer.adaln_modulation.2.weight": (2 * D, rank),
              "pos_embedder.seq": (128,), "pos_embedder.dim_spatial_range": (d // 6,),
              "pos_embedder.dim_temporal_range": (d // 2 - 2 * (d // 6),)}
    shapes |= {f"accum_{name}": (1,) for name in ("video_sample_counter", "image_sample_counter", "iteration",
                                                  "train_in_hours")}
    for i in range(c["num_layers"]):
        for attention, context in (("self_attn", D), ("cross_attn", c["text_embed_dim"])):
            layers = {"q_proj": (D, D), "k_proj": (D, context), "v_proj": (D, context), "output_proj": (D, D),
                      "q_norm": (d,), "k_norm": (d,)}
            for layer, shape in layers.items():
                shapes[f"blocks.{i}.{attention}.{layer}.weight"] = shape
                if layer.endswith("_norm"):
                    shapes[f"blocks.{i}.{attention}.{layer}._extra_state"] = (0,)
        for name in ("self_attn", "cross_attn", "mlp"):
            shapes[f"blocks.{i}.adaln_modulation_{name}.1.weight"] = (rank, D)
            shapes[f"blocks.{i}.adaln_modulation_{name}.2.weight"] = (3 * D, rank)
        shapes |= {f"blocks.{i}.mlp.layer1.weight": (inner, D), f"blocks.{i}.mlp.layer2.weight": (D, inner)}
    return {copy + name: torch.randn(shape) / (shape[-1] ** 0.5 or 1) for name, shape in shapes.items()}


def test_a_checkpoint_in_nvidias_layout_loads_and_matches_diffusers(saved, tmp_path):
    torch.manual_seed(3)
    state = nvidia_state()
    save_file(state | nvidia_state("net_ema."), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    reference = CosmosTransformer3DModel(**SMALL, **PREDICT2).eval()
    reference.load_state_dict(convert_cosmos_transformer_checkpoint_to_diffusers(dict(state)))
    z, t, text, mask = inputs(1, 2, 4, 6, torch.float32)
    with torch.no_grad():
        close(CosmosDiT.from_pretrained(tmp_path)(z, t, text, mask), published(reference, z, t, text, mask), 1e-5)


@pytest.mark.parametrize("size, tensors, parameters", [("0.6B", 407, 597_536_000), ("2B", 567, 1_956_405_248)])
def test_both_layouts_of_the_official_sizes_are_accounted_for_name_by_name(size, tensors, parameters):
    config = OFFICIAL | SIZES[size]
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in CosmosTransformer3DModel(**config, **PREDICT2).state_dict().items()}
        ours = CosmosDiT(CosmosDiTConfig(**config)).state_dict()
        nvidia = nvidia_state(**config)
    assert {k: tuple(v.shape) for k, v in ours.items()} == theirs
    assert (len(ours), sum(v.numel() for v in ours.values())) == (tensors, parameters)

    names = {name: CosmosDiT.translate_key(name) for name in nvidia}
    assert {names[k]: tuple(v.shape) for k, v in nvidia.items() if names[k]} == theirs
    unused = [name for name in names if names[name] is None]
    assert len(names) == tensors + 3 + 4 + 4 * config["num_layers"] + 1 == len(ours) + len(unused)
    assert {CosmosDiT.translate_key(name) for name in theirs} == theirs.keys(), "diffusers' own names stay"
    assert set(theirs) == convert_cosmos_transformer_checkpoint_to_diffusers(nvidia).keys()
    spelled = {name.removeprefix("net.") for name in names}
    assert all(any(s == f"{layer}.weight" or s.endswith(f".{layer}.weight") for s in spelled) for layer in NAMES)
    assert UNUSED <= spelled
    assert CosmosDiTConfig() == CosmosDiTConfig(**OFFICIAL | SIZES["0.6B"]), "the defaults are the 0.6B's"


@pytest.mark.parametrize("name", ["net.blocks.0.cross_attn.k_img.weight", "net.pos_embedder.freqs", "logvar.0.freqs",
                                  "net.blocks.0.mlp.layer3.weight", "net.accum_loss"])
def test_a_name_that_is_in_no_table_is_left_for_the_strict_loader_to_refuse(saved, name):
    key = CosmosDiT.translate_key(name)
    assert key is not None and key not in CosmosDiT.from_pretrained(saved).state_dict()


def test_the_average_alone_is_refused_as_missing_weights(saved, tmp_path):
    save_file(nvidia_state("net_ema."), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(ValueError, match="missing: patch_embed.proj.weight"):
        CosmosDiT.from_pretrained(tmp_path)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"extra_pos_embed_type": "learnable"}, {"concat_padding_mask": False},
                                    {"patch_size": [2, 2, 2]}, {"in_channels": 17}, {"img_context_dim_in": 1152},
                                    {"use_crossattn_projection": True}, {"controlnet_block_every_n": 7},
                                    {"attention_head_dim": 10}, {"max_size": [128, 240]}, {"rope_scale": [1, 4, 0]},
                                    {"rope_scale": 4.0}, {"num_layers": -1}, {"window_size": 8}])
def test_a_field_that_would_change_the_result_is_refused_by_name(saved, change):
    config = json.loads((saved / "config.json").read_text())
    assert weights.read_config(CosmosDiT, config, "small") == CosmosDiTConfig(**SMALL)
    with pytest.raises(ValueError, match=next(iter(change))):
        weights.read_config(CosmosDiT, config | change, "changed")


def test_a_number_that_torch_cannot_take_is_refused_in_one_line(saved):
    fields = json.loads((saved / "config.json").read_text()) | {"mlp_ratio": 1e30}
    with pytest.raises(ValueError, match=r"^a.json: describes no CosmosDiT: .*\Z"):
        weights.without_weights(CosmosDiT, fields, "a.json")


def test_a_field_that_is_missing_is_not_guessed(saved):
    config = json.loads((saved / "config.json").read_text())
    for field in ("rope_scale", "max_size", "num_attention_heads"):
        with pytest.raises(ValueError, match=field):
            weights.read_config(CosmosDiT, {k: v for k, v in config.items() if k != field}, "incomplete")


def test_wrong_shapes_and_sizes_over_the_cap_are_named(saved):
    dit = CosmosDiT.from_pretrained(saved)
    z, t, text, _ = inputs(2, 1, 2, 2, torch.float32)
    with pytest.raises(ValueError, match=r"z must be \[B, 4, F, h, w\], got \[2, 3, 1, 2, 2\]"):
        dit(z[:, :3], t, text)
    with pytest.raises(ValueError, match=r"text must be \[B=2, L, text_embed_dim=12\], got \[1, 7, 12\]"):
        dit(z, t, text[:1])
    with pytest.raises(ValueError, match=r"t must be a number, \[B\] .* z \[2, 4, 1, 2, 2\], got \[3\]"):
        dit(z, torch.rand(3), text)
    for size in ((17, 2, 2), (1, 65, 2), (1, 2, 66)):
        with pytest.raises(ValueError, match=r"at most max_size \[16, 64, 64\]"):
            dit(torch.zeros(1, 4, *size), 0.2)
    with torch.no_grad():
        assert dit(torch.zeros(1, 4, 1, 1, 64), 0.2).shape == (1, 4, 1, 1, 64)
