"""The Wan transformer against diffusers' on the same weights, in both layouts of its checkpoints.

The reference rounds its norms, its timestep embedding and its rotary tables to float32 even in a float64 model.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as nnf

from tests.torchvision_stub import stub

stub()

from diffusers import WanTransformer3DModel  # noqa: E402
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed  # noqa: E402

from mirage_min.networks import weights  # noqa: E402
from mirage_min.networks.dit_wan import WanDiT, WanDiTConfig, rotary_table  # noqa: E402
from mirage_min.networks.wan_names import BLOCK_NAMES, NAMES  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "shared" / "checkpoint_configs"
SMALL = dict(num_attention_heads=2, attention_head_dim=20, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
             ffn_dim=64, num_layers=2)


def published_config(name: str) -> dict:
    path = CONFIGS / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/checkpoint_configs/{name}")
    return json.loads(path.read_text())


def randomise(model: nn.Module) -> None:
    """Weights that keep a signal's size; gains, tables and biases far enough from 1 and 0 to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "scale_shift_table" in name or name.endswith("bias"):
                p.normal_(std=0.3)
            elif p.ndim == 1:
                p.normal_(1, 0.3)
            else:
                p.normal_(std=p[0].numel() ** -0.5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan_dit")
    model = WanTransformer3DModel(**SMALL)
    randomise(model)
    model.save_pretrained(folder)
    return folder


def pair(folder, dtype):
    return (WanTransformer3DModel.from_pretrained(folder).to(dtype).eval(), WanDiT.from_pretrained(folder, dtype=dtype))


def inputs(B, n, h, w, dtype, L=7):
    torch.manual_seed(2)
    return torch.randn(B, 4, n, h, w, dtype=dtype), torch.tensor([200, 731][:B]), torch.randn(B, L, 12, dtype=dtype)


def published(reference, z, t, text):
    """The published transformer wants even rows and columns: published(pad(z)), cropped back."""
    h, w = z.shape[3:]
    out = reference(nnf.pad(z, (0, w % 2, 0, h % 2, 0, 0), mode="replicate"), t, text, return_dict=False)[0]
    return out[..., :h, :w]


def close(ours, theirs, bound, rms=False):
    difference = (ours - theirs).double()
    size = difference.square().mean().sqrt() if rms else difference.abs().max()
    assert ours.shape == theirs.shape
    assert size <= bound * theirs.double().std(), f"difference {size:.2e}, bound {bound:.0e} of std {theirs.std():.2e}"


@pytest.mark.parametrize("B, n, h, w", [(1, 1, 2, 2), (2, 3, 8, 12), (1, 9, 4, 6), (2, 2, 5, 7), (1, 4, 1, 3)])
def test_matches_the_published_transformer(saved, B, n, h, w):
    with torch.no_grad():
        reference, dit = pair(saved, torch.float64)
        z, t, text = inputs(B, n, h, w, torch.float64)
        close(dit(z, t, text), published(reference, z, t, text), 1e-5)

        reference, dit = pair(saved, torch.float32)
        z, t, text = inputs(B, n, h, w, torch.float32)
        close(dit(z, t, text), published(reference, z, t, text), 1e-5, rms=True)


def test_one_timestep_as_a_number_serves_the_whole_batch(saved):
    dit = WanDiT.from_pretrained(saved)
    z, _, text = inputs(2, 3, 4, 4, torch.float32)
    with torch.no_grad():
        close(dit(z, 200, text), dit(z, torch.tensor([200, 200]), text), 0)
        assert not torch.equal(dit(z, 200, text), dit(z, 201, text))


@pytest.mark.parametrize("h, w", [(4, 6), (3, 5)])
def test_a_timestep_for_each_latent_is_the_published_one_for_each_patch(saved, h, w):
    """The first latent clean, as where a video starts from an image; the others at different noise levels."""
    reference, dit = pair(saved, torch.float64)
    z, _, text = inputs(2, 3, h, w, torch.float64)
    t = torch.tensor([[0, 200, 731], [0, 900, 50]])
    patches = -(-h // 2) * -(-w // 2)
    with torch.no_grad():
        close(dit(z, t, text), published(reference, z, t.repeat_interleave(patches, dim=1), text), 1e-5)
        once, each = dit(z, t[:, 1], text), dit(z, t[:, 1:2].expand(2, 3), text)
        close(each, once, 1e-12)
        assert (dit(z, t, text) - once).abs().max() > 0.01 * once.std()


def test_no_tensor_with_six_modulations_for_each_patch_is_made(saved):
    """24 patches a latent: of a modulation spread over them, six times the tokens would be alive at once."""
    dit = WanDiT.from_pretrained(saved, dtype=torch.float32)
    z, _, text = inputs(1, 3, 8, 12, torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        dit(z, torch.tensor([[0, 200, 731]]), text)
    assert max(sizes) < 6 * 3 * 24 * 40, f"a tensor of {max(sizes)} numbers is kept"


def test_gradients_match_the_published_ones(saved):
    reference, dit = pair(saved, torch.float64)
    z, t, text = inputs(2, 3, 4, 6, torch.float64)
    z, text = z.requires_grad_(), text.requires_grad_()
    weight = torch.randn_like(z)
    theirs = torch.autograd.grad((published(reference, z, t, text) * weight).sum(), (z, text))
    ours = torch.autograd.grad((dit(z, t, text) * weight).sum(), (z, text))
    for a, b in zip(ours, theirs):
        close(a, b, 1e-5)


def test_activation_checkpointing_changes_neither_result_nor_gradients(saved):
    dit = WanDiT.from_pretrained(saved, dtype=torch.float64)
    z, t, text = inputs(1, 2, 5, 4, torch.float64)
    results = []
    for dit.activation_checkpointing in (False, True):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            out = dit(z.requires_grad_(), t, text)
        grads = torch.autograd.grad(out.square().sum(), [z, *dit.parameters()])
        results.append((out, grads, sum(held)))
    (out, grads, held), (out_again, grads_again, held_again) = results
    close(out_again, out, 1e-12)
    for a, b in zip(grads_again, grads):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    assert held_again < 0.3 * held, f"numbers kept for backward: {held_again} against {held}"


@pytest.mark.parametrize("grid, dim", [((3, 4, 6), 128), ((1, 1, 1), 20), ((21, 2, 3), 16)])
def test_rotary_tables_are_diffusers_own(grid, dim):
    cos, sin = WanRotaryPosEmbed(dim, (1, 2, 2), 1024)(torch.zeros(1, 1, grid[0], 2 * grid[1], 2 * grid[2]))
    theirs = torch.complex(cos[0, :, 0, 0::2], sin[0, :, 0, 1::2])
    difference = (rotary_table(grid, dim, torch.device("cpu")) - theirs).abs().max()
    assert difference <= 1e-7, f"largest difference {difference:.1e}"


def test_bfloat16_stays_within_two_percent_of_float32(saved):
    """Root-mean-square, relative to the output's std; both models have the weights rounded to bfloat16."""
    low = WanDiT.from_pretrained(saved, dtype=torch.bfloat16)
    high = WanDiT.from_pretrained(saved, dtype=torch.bfloat16).float()
    z, t, text = (v.bfloat16() if v.is_floating_point() else v for v in inputs(2, 3, 5, 6, torch.float32))
    with torch.no_grad():
        out = low(z, t, text)
        assert out.dtype == torch.bfloat16
        close(out.float(), high(z.float(), t, text.float()), 2e-2, rms=True)


def test_every_linear_layer_is_called_so_that_an_adapter_on_it_works(saved):
    dit, called = WanDiT.from_pretrained(saved), set()
    linears = {name: m for name, m in dit.named_modules() if isinstance(m, nn.Linear)}
    for name, m in linears.items():
        m.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        dit(*inputs(1, 1, 2, 2, torch.float32))
    assert called == linears.keys()


def test_diffusers_reads_what_we_save(saved, tmp_path):
    dit = WanDiT.from_pretrained(saved)
    dit.save_pretrained(tmp_path)
    z, t, text = inputs(1, 2, 4, 4, torch.float32)
    with torch.no_grad():
        close(dit(z, t, text), published(WanTransformer3DModel.from_pretrained(tmp_path), z, t, text), 1e-5, rms=True)


# ---- the original layout --------------------------------------------------------------------------------------------


def original_skeleton(dim, ffn_dim, freq_dim, text_dim, num_layers, in_dim, out_dim) -> nn.Module:
    """The module tree of the original repository's WanModel, as far as it has parameters."""
    def attention():
        layers = {name: nn.Linear(dim, dim) for name in "qkvo"}
        return nn.ModuleDict(layers | {"norm_q": nn.RMSNorm(dim), "norm_k": nn.RMSNorm(dim)})

    def block():
        tree = nn.ModuleDict({"self_attn": attention(), "norm3": nn.LayerNorm(dim), "cross_attn": attention(),
                              "ffn": nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))})
        tree.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        return tree

    head = nn.ModuleDict({"head": nn.Linear(dim, out_dim * 4)})
    head.modulation = nn.Parameter(torch.zeros(1, 2, dim))
    return nn.ModuleDict({
        "patch_embedding": nn.Conv3d(in_dim, dim, (1, 2, 2), stride=(1, 2, 2)),
        "text_embedding": nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(), nn.Linear(dim, dim)),
        "time_embedding": nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)),
        "time_projection": nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)),
        "blocks": nn.ModuleList(block() for _ in range(num_layers)),
        "head": head,
    })


def shapes(model: nn.Module) -> dict:
    return {name: tuple(v.shape) for name, v in model.state_dict().items()}


def test_a_checkpoint_in_the_original_layout_loads_and_matches_diffusers(tmp_path):
    sizes = dict(dim=40, ffn_dim=64, freq_dim=16, num_layers=2, in_dim=4, out_dim=4)
    original = original_skeleton(**sizes, text_dim=4096)
    randomise(original)
    # In shards, as the 14B comes.
    state, weight_map = original.state_dict(), {}
    for i in range(2):
        shard = dict(list(state.items())[i::2])
        save_file(shard, tmp_path / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
        weight_map |= dict.fromkeys(shard, f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(
        {"_class_name": "WanModel", "model_type": "t2v", "eps": 1e-6, "num_heads": 2, "text_len": 512} | sizes))

    reference = WanTransformer3DModel(**SMALL | {"text_dim": 4096})
    reference.load_state_dict(convert_wan_transformer_to_diffusers({k: v.clone() for k, v in state.items()}))
    z, t, _ = inputs(1, 2, 4, 6, torch.float32)
    text = torch.randn(1, 5, 4096)
    with torch.no_grad():
        close(WanDiT.from_pretrained(tmp_path)(z, t, text), published(reference.eval(), z, t, text), 1e-5, rms=True)


def test_the_key_map_is_one_to_one_and_covers_both_layouts():
    """At the 14B's size: every original name meets one of ours with its shape, and back; no entry is left over."""
    with torch.device("meta"):
        ours = shapes(WanDiT())
        theirs = shapes(original_skeleton(dim=5120, ffn_dim=13824, freq_dim=256, text_dim=4096, num_layers=40,
                                          in_dim=16, out_dim=16))
    assert {WanDiT.translate_key(name): shape for name, shape in theirs.items()} == ours
    assert len(theirs) == len(ours)
    assert {name: WanDiT.translate_key(name) for name in ours} == {name: name for name in ours}

    back = {v: k for k, v in BLOCK_NAMES.items()}, {v: k for k, v in NAMES.items()}
    for name in ours:
        block, rest = ("blocks.3.", name.removeprefix("blocks.3.")) if name.startswith("blocks.3.") else ("", name)
        if block or not name.startswith("blocks."):
            table = back[0] if block else back[1]
            layer, _, parameter = rest.rpartition(".")
            spelled = block + (table[rest] if rest in table else f"{table[layer]}.{parameter}")
            assert theirs[spelled] == ours[name]
    used = {WanDiT.translate_key(name) for name in theirs}
    for prefix, table in (("blocks.0.", BLOCK_NAMES), ("", NAMES)):
        assert all(any(u == prefix + v or u.startswith(prefix + v + ".") for u in used) for v in table.values())


@pytest.mark.parametrize("name", ["img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight", "blocks.0.norm2.weight"])
def test_a_name_that_is_in_no_map_is_left_for_the_strict_loader_to_refuse(name):
    assert WanDiT.translate_key(name) == name


def test_both_official_1_3b_configs_describe_the_same_network():
    original, ours = (weights.read_config(WanDiT, published_config(f"wan2.1-t2v-1.3b.{layout}.json"), layout)
                      for layout in ("original", "transformer.diffusers"))
    assert original == ours
    assert (original.num_layers, original.num_attention_heads, original.attention_head_dim) == (30, 12, 128)


# ---- official sizes, and what is refused ----------------------------------------------------------------------------


def test_official_1_3b_has_the_published_keys_and_shapes():
    config = published_config("wan2.1-t2v-1.3b.transformer.diffusers.json")
    with torch.device("meta"):
        theirs = shapes(WanTransformer3DModel.from_config(config))
        ours = shapes(WanDiT(weights.read_config(WanDiT, config, "1.3B")))
    assert ours == theirs


def test_official_14b_has_the_published_keys_and_shapes():
    """Its config is diffusers' default."""
    with torch.device("meta"):
        theirs, ours = WanTransformer3DModel(), WanDiT()
    assert shapes(ours) == shapes(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 14_288_491_584
    assert weights.read_config(WanDiT, dict(theirs.config) | {"_class_name": "WanTransformer3DModel",
                                                             "patch_size": [1, 2, 2]}, "14B") == WanDiTConfig()


def test_both_official_ti2v_5b_configs_describe_the_same_network_with_the_published_keys_and_shapes():
    given = [published_config(f"wan2.2-ti2v-5b.{layout}.json") for layout in ("original", "transformer.diffusers")]
    original, ours = (weights.read_config(WanDiT, config, "5B") for config in given)
    assert original == ours
    assert (ours.num_layers, ours.num_attention_heads, ours.in_channels) == (30, 24, 48)
    with torch.device("meta"):
        theirs, model = WanTransformer3DModel.from_config(given[1]), WanDiT(ours)
    assert shapes(model) == shapes(theirs) and len(shapes(model)) == 825
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(4999.8e6, rel=1e-4)


@pytest.mark.parametrize("change", [{"image_dim": 1280}, {"added_kv_proj_dim": 5120}, {"pos_embed_seq_len": 514},
                                    {"patch_size": [2, 2, 2]}, {"qk_norm": "layer_norm"}, {"cross_attn_norm": False},
                                    {"in_channels": 36}, {"window_size": [8, 8]}])
def test_a_field_that_would_change_the_result_is_refused_by_name(saved, change):
    config = json.loads((saved / "config.json").read_text())
    assert weights.read_config(WanDiT, config, "small") == WanDiTConfig(**SMALL)
    with pytest.raises(ValueError, match=next(iter(change))):
        weights.read_config(WanDiT, config | change, "changed")


@pytest.mark.parametrize("change", [{"model_type": "i2v"}, {"window_size": [8, 8]}, {"qk_norm": False}, {"in_dim": 36}])
def test_an_original_config_that_is_not_text_to_video_is_refused(change):
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 1536, "eps": 1e-6, "ffn_dim": 8960,
              "freq_dim": 256, "in_dim": 16, "num_heads": 12, "num_layers": 30, "out_dim": 16, "text_len": 512}
    assert weights.read_config(WanDiT, config, "t2v").ffn_dim == 8960
    with pytest.raises(ValueError, match=next(iter(change)).replace("in_dim", "in_channels")):
        weights.read_config(WanDiT, config | change, "changed")
    with pytest.raises(ValueError, match="^incomplete: .*num_heads"):
        weights.read_config(WanDiT, {k: v for k, v in config.items() if k != "num_heads"}, "incomplete")
    for spoilt in ({"num_heads": 0}, {"dim": "1536"}, {"num_heads": [12]}):
        with pytest.raises(ValueError, match="^spoilt: WanDiT does not understand this layout"):
            weights.read_config(WanDiT, config | spoilt, "spoilt")


def test_wrong_shapes_are_named(saved):
    dit = WanDiT.from_pretrained(saved)
    z, t, text = inputs(2, 1, 2, 2, torch.float32)
    with pytest.raises(ValueError, match=r"z_t must be \[B, 4, F, h, w\], got \[2, 3, 1, 2, 2\]"):
        dit(z[:, :3], t, text)
    with pytest.raises(ValueError, match=r"text must be \[B=2, L, text_dim=12\], got \[1, 7, 12\]"):
        dit(z, t, text[:1])
    for wrong in ([200, 300, 400], [[200, 300]], [[[200]]]):
        with pytest.raises(ValueError, match=r"t must be a number, \[B=2\] or \[B=2, F=1\], got"):
            dit(z, torch.tensor(wrong), text)
