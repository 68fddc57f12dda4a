"""DiffusionHarmonizer: both wirings against loops over diffusers' own networks, and the pruned step against the whole.

The loops here are written from the paper (Eqs. 1 and 2) and from what is known of the release, not from the code.
"""

import json
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf
from torch.utils.flop_counter import FlopCounterMode

from mirage_min.networks import weights
from mirage_min.networks.dit_cosmos import CosmosDiT, CosmosDiTConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.systems.harmonizer import Harmonizer, Settings
from mirage_min.training.memory import LiveBytes
from tests.torchvision_stub import stub

stub()

from diffusers import AutoencoderKLWan, CosmosTransformer3DModel  # noqa: E402

DIT = dict(num_attention_heads=2, attention_head_dim=24, num_layers=3, text_embed_dim=12, adaln_lora_dim=6,
           max_size=(16, 64, 64), rope_scale=(1.0, 4.0, 4.0), in_channels=16, out_channels=16, mlp_ratio=4.0)
WIRINGS = pytest.mark.parametrize("wiring", ["release", "paper"])


@pytest.fixture(scope="module")
def parts():
    """A VAE and a transformer whose every part can be seen in the result."""
    torch.manual_seed(0)
    vae, dit = WanVAE(WanVAEConfig(base_dim=8, num_res_blocks=1)), CosmosDiT(CosmosDiTConfig(**DIT))
    with torch.no_grad():
        for name, p in [*vae.named_parameters(), *dit.named_parameters()]:
            if p.ndim > 1 and not name.endswith("gamma"):
                p.normal_(std=p[0].numel() ** -0.5)
            elif not name.endswith("bias"):
                p.normal_(1, 0.2)
        vae.decoder.conv_out.weight.mul_(0.3)  # keeps most pixels within [-1, 1]: the clamp would hide what differs
    return vae, dit


def harmonizer(parts, wiring="release", dtype=torch.float32, **settings) -> Harmonizer:
    parts = parts if dtype == torch.float32 else deepcopy(parts)
    return Harmonizer(*parts, Settings(wiring, **settings)).requires_grad_(False).eval().to(dtype)


def video(T, H=20, W=36, B=1, dtype=torch.float32, seed=1):
    return torch.rand(B, 3, T, H, W, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def close(ours, theirs, bound):
    assert ours.shape == theirs.shape
    difference, std = (ours - theirs).abs().max(), theirs.std()
    assert difference <= bound * std, f"difference {difference:.2e}, bound {bound:.0e} of std {std:.2e}"


def in_8_bits(x):
    """What comes back from an image file."""
    return (((x.float() + 1) * 127.5).round() / 127.5 - 1).to(x.dtype)


def filled(x):
    """To multiples of 16 pixels."""
    return nnf.pad(x, (0, -x.shape[-1] % 16, 0, -x.shape[-2] % 16), mode="replicate")


# ---- against the published networks ---------------------------------------------------------------------------------


def published(parts):
    """encode, F and decode of diffusers, with our weights."""
    vae, dit = AutoencoderKLWan(base_dim=8, num_res_blocks=1), CosmosTransformer3DModel(
        **DIT, concat_padding_mask=True, extra_pos_embed_type=None, patch_size=(1, 2, 2))
    vae.load_state_dict(parts[0].state_dict())
    dit.load_state_dict(parts[1].state_dict())
    vae, dit = vae.eval(), dit.eval()
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))

    def encode(x):
        return (vae.encode(x).latent_dist.mean - mean) / std

    def network(z, t):
        B, _, _, h, w = z.shape
        text, mask = torch.zeros(B, 512, 12), torch.zeros(1, 1, 8 * h, 8 * w)
        return dit(z, torch.full((B,), t), text, padding_mask=mask, return_dict=False)[0]

    def decode(z):
        return vae.decode(z * std + mean, return_dict=False)[0]
    return encode, network, decode


def release_loop(parts, x):
    """What NVIDIA's inference script does, frame after frame, with files of 8 bits between them."""
    encode, network, decode = published(parts)
    H, W, written, results = *x.shape[-2:], [], []
    for t in range(x.shape[2]):
        stack = [x[:, :, t]] + ([written[t - k] for k in (1, 2, 3, 4)] if t >= 4 else [])
        z = encode(torch.stack([filled(frame) for frame in stack], dim=2))
        assert z.shape[2] == (2 if t >= 4 else 1)
        x0 = 0.8 * z - 0.2 * network(0.8 * z, 0.2)
        y = decode(x0)[:, :, 0, :H, :W]
        written.append(in_8_bits(y.clamp(-1, 1)))
        results.append(y.clamp(-1, 1))
    return torch.stack(results, dim=2)


def paper_loop(parts, x):
    """Eq. 2: Z_t = (E(I_t), E(Î_t−1), …, E(Î_t−K)), of as many outputs as there are."""
    encode, network, decode = published(parts)
    H, W, results = *x.shape[-2:], []
    for t in range(x.shape[2]):
        frames = [x[:, :, t]] + results[::-1][:4]
        z = torch.cat([encode(filled(frame).unsqueeze(2)) for frame in frames], dim=2)
        x0 = 0.8 * z - 0.2 * network(0.8 * z, 0.2)
        results.append(decode(x0[:, :, :1])[:, :, 0, :H, :W].clamp(-1, 1))
    return torch.stack(results, dim=2)


@pytest.mark.parametrize("wiring, loop", [("release", release_loop), ("paper", paper_loop)])
def test_matches_a_loop_over_the_published_networks(parts, wiring, loop):
    x = video(6)
    with torch.no_grad():
        ours, theirs = harmonizer(parts, wiring)(x), loop(parts, x)
        assert (theirs.abs() < 1).float().mean() > 0.8, "the clamp hides too much"
        # An output that rounding moves over the middle between two of the 256 levels may come back a level away.
        close(ours.clamp(-1, 1), theirs, 1e-4 if wiring == "paper" else 2e-2)
        assert ((ours.clamp(-1, 1) - theirs).abs() <= 1e-4 * theirs.std()).float().mean() > (0.99 if wiring == "paper"
                                                                                              else 0.7)


@WIRINGS
@pytest.mark.parametrize("change_only", [False, True])
def test_pruned_is_equal_to_whole(parts, wiring, change_only):
    """In float64, so that only what is left out could make a difference."""
    model = harmonizer(parts, wiring, torch.float64, change_only=change_only)
    past, outputs = [], []
    with torch.no_grad():
        for frame in video(6, 16, 24, B=2, dtype=torch.float64).unbind(dim=2):
            pruned, whole = model.enhance(frame, past), model.enhance_whole(frame, outputs)
            assert (pruned - whole).abs().max() <= 1e-12, f"largest difference {(pruned - whole).abs().max():.1e}"
            past = model.remember(pruned, past)
            kept = pruned.clamp(-1, 1)
            outputs = [in_8_bits(kept) if wiring == "release" else kept, *outputs]


@WIRINGS
def test_change_only_adds_to_the_frame_what_the_transformer_changes(parts, wiring):
    plain, changing = harmonizer(parts, wiring), harmonizer(parts, wiring, change_only=True)
    frame, *outputs = video(5, 20, 36).unbind(2)
    past = []
    for y in outputs[::-1]:
        past = plain.remember(y, past)
    with torch.no_grad():
        through = plain.vae.decode(plain.vae.encode(plain.pad(frame).unsqueeze(2)))[:, :, 0, :20, :36]
        close(changing.enhance(frame, past), frame + plain.enhance(frame, past) - through, 1e-5)
        changing.denoise = lambda z, constants: z[:, :, :1]
        close(changing.enhance(frame, past), frame, 1e-5)


@WIRINGS
def test_attention_to_the_text_is_not_missed(parts, wiring):
    vae, dit = parts
    small = CosmosDiT(CosmosDiTConfig(**DIT, cross_attention=False))
    small.load_state_dict({k: v for k, v in dit.state_dict().items() if ".attn2." not in k and ".norm2." not in k})
    x = video(5, 16, 16)
    with torch.no_grad():
        close(harmonizer((vae, small), wiring)(x), harmonizer(parts, wiring)(x), 1e-6)


def test_one_step_weighs_the_latent_and_the_prediction_by_edms_sigma(parts):
    class Prediction(nn.Module):
        config = parts[1].config

        def modulations(self, t, dtype):
            self.t = float(t)
            return ()

        def predict(self, z, modulations, keep):
            self.seen = z
            return torch.full_like(z[:, :, :keep], 3.0)

    class Latent(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

        def encode(self, x):
            return torch.ones(1, 16, 1, 2, 2)

        def decode(self, z):
            self.seen = z
            return torch.zeros(1, 3, 1, 16, 16)

    vae, dit = Latent(), Prediction()
    Harmonizer(vae, dit)(video(1, 16, 16))
    assert dit.t == pytest.approx(0.2) and torch.allclose(dit.seen, torch.tensor(0.8))
    assert torch.allclose(vae.seen, torch.tensor(0.8 * 1 - 0.2 * 3))
    Harmonizer(vae, dit, Settings(sigma=1.0))(video(1, 16, 16))
    assert dit.t == pytest.approx(0.5) and torch.allclose(vae.seen, torch.tensor(0.5 * 1 - 0.5 * 3))


# ---- the past -------------------------------------------------------------------------------------------------------


@WIRINGS
def test_which_frames_a_frame_depends_on(parts, wiring):
    """Through the outputs between them all earlier frames; but in the release none before there are four outputs."""
    model, x = harmonizer(parts, wiring), video(6, 16, 16)
    with torch.no_grad():
        y = model(x)
        for t in (0, 3, 4):
            changed = x.clone()
            changed[:, :, t] = -changed[:, :, t]
            moved = [bool((a != b).any()) for a, b in zip(model(changed).unbind(2), y.unbind(2))]
            later = [u > t and (wiring == "paper" or u >= 4) for u in range(6)]
            assert moved == [u == t or later[u] for u in range(6)], f"frame {t}"


@WIRINGS
def test_the_last_k_outputs_are_in_view_and_no_more(parts, wiring):
    model, frame = harmonizer(parts, wiring), video(1)[:, :, 0]
    with torch.no_grad():
        past = []
        for y in video(9).unbind(2):
            past = model.remember(y, past)
        assert len(past) == 4
        sizes = {"release": [1, 1, 1, 1, 2], "paper": [1, 2, 3, 4, 5]}[wiring]
        assert [model.latents(model.pad(frame), past[:n]).shape[2] for n in range(5)] == sizes
        eight = harmonizer(parts, wiring, past=8)
        past = [kept for y in video(8).unbind(2) for kept in eight.remember(y, [])]
        assert eight.latents(model.pad(frame), past).shape[2] == {"release": 3, "paper": 9}[wiring]
        alone = harmonizer(parts, wiring, past=0)
        close(alone(video(2))[:, :, 1], alone(video(2)[:, :, 1:])[:, :, 0], 1e-6)


def test_keys_of_the_past_change_with_the_current_frame_so_that_a_cache_of_them_would_not_be_exact(parts):
    model, keys = harmonizer(parts, "paper"), {}
    hooks = [block.attn1.to_k.register_forward_hook(lambda _, __, k, i=i: keys.setdefault(i, []).append(k))
             for i, block in enumerate(model.dit.transformer_blocks)]
    past = model.remember(video(1)[:, :, 0], [])
    with torch.no_grad():
        for seed in (2, 3):
            model.enhance(video(1, seed=seed)[:, :, 0], past)
    for hook in hooks:
        hook.remove()
    of_past = {i: [k[:, 1] for k in both] for i, both in keys.items()}
    close(*of_past[0], 1e-5)
    for i in (1, 2):
        a, b = of_past[i]
        assert (a - b).abs().max() > 1e-3 * a.std(), f"block {i}"


# ---- any length -----------------------------------------------------------------------------------------------------


@WIRINGS
def test_a_stream_is_the_clip_and_two_streams_do_not_meet(parts, wiring):
    model, x, other = harmonizer(parts, wiring), video(6, 16, 24), video(6, 20, 16, seed=5)
    with torch.no_grad():
        wanted, wanted_other = (model(v)[0].clamp(-1, 1).unbind(1) for v in (x, other))
    both = zip(model.stream(x[0].unbind(1)), model.stream(other[0].unbind(1)))
    for t, (y, z) in enumerate(both):
        close(y, wanted[t], 1e-6)
        close(z, wanted_other[t], 1e-6)
    assert list(model.stream([])) == []


@WIRINGS
def test_memory_does_not_grow_with_the_length(parts, wiring):
    model, peaks = harmonizer(parts, wiring), []
    list(model.stream(torch.rand(5, 3, 16, 16)))  # makes the tables that stay
    for T in (6, 8):
        with LiveBytes(model) as live:
            for _ in model.stream(torch.rand(3, 16, 16) for _ in range(T)):
                pass
        peaks.append(live.peak)
    assert peaks[1] <= peaks[0], f"bytes alive at once: {peaks}"


def test_a_frame_of_another_size_and_one_too_small_are_named(parts):
    model = harmonizer(parts)
    stream = model.stream([torch.zeros(3, 16, 16), torch.zeros(3, 16, 24)])
    next(stream)
    with pytest.raises(ValueError, match=r"frame 1: wanted \[3, 16, 16\] as the frames before it, got \[3, 16, 24\]"):
        next(stream)
    with pytest.raises(ValueError, match="at least 16x16, got 8x16"):
        model(torch.zeros(1, 3, 1, 8, 16))
    with pytest.raises(ValueError, match=r"wanted \[B, 3, T, H, W\], got \[1, 4, 1, 16, 16\]"):
        model(torch.zeros(1, 4, 1, 16, 16))


@WIRINGS
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_stream_in_half_precision_is_about_that_in_float32(parts, wiring, dtype, bound):
    frames = video(6, 16, 16)[0].unbind(1)
    wanted = torch.stack(list(harmonizer(parts, wiring).stream(frames)))
    half = list(harmonizer(parts, wiring, dtype).stream(frames))
    assert all(y.dtype == torch.float32 for y in half)
    rms = ((torch.stack(half) - wanted).square().mean().sqrt() / wanted.std()).item()
    assert rms < bound, f"RMS {rms:.3f} of the std, allowed {bound}"


@WIRINGS
def test_an_overflow_in_float16_ends_the_stream_at_its_frame(parts, wiring):
    model = harmonizer(parts, wiring, torch.float16)
    model.vae.decoder.conv_out.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"^frame 0 .*not finite.* float16 ends at 65504"):
        list(model.stream(video(2, 16, 16)[0].unbind(1)))


# ---- gradients ------------------------------------------------------------------------------------------------------


@WIRINGS
@pytest.mark.parametrize("change_only", [False, True])
def test_gradients_of_the_pruned_step_are_those_of_the_whole(parts, wiring, change_only):
    model = harmonizer(parts, wiring, torch.float64, change_only=change_only)
    frame, *outputs = video(5, 16, 16, dtype=torch.float64).unbind(2)
    outputs, past = [in_8_bits(y) for y in outputs], []
    for y in outputs[::-1]:
        past = model.remember(y, past)
    trained = dict(model.dit.requires_grad_().named_parameters())
    grads = []
    for y in (model.enhance(frame, past), model.enhance_whole(frame, outputs)):
        grads.append(torch.autograd.grad(y.square().sum(), list(trained.values()), allow_unused=True))
    for name, a, b in zip(trained, *grads):
        if ".attn2." in name or ".norm2." in name:  # in the whole: zeros, for the null text has no effect
            assert a is None and (b is None or not b.any())
        else:
            assert (a - b).abs().max() <= 1e-10 * b.abs().max(), name


def test_gradients_go_through_each_frames_own_step(parts):
    model = harmonizer(parts, "paper")
    model.dit.requires_grad_()
    x = video(3, 16, 16)
    together = torch.autograd.grad(model(x).sum(), model.dit.proj_out.weight)[0]
    past, alone = [], 0
    for frame in x.unbind(2):
        y = model.enhance(frame, past)
        alone = alone + torch.autograd.grad(y.sum(), model.dit.proj_out.weight)[0]
        past = model.remember(y.detach(), past)
    close(together, alone, 1e-4)
    model.dit.requires_grad_(False)


# ---- operations -----------------------------------------------------------------------------------------------------


def operations(model: Harmonizer, H: int, W: int, device) -> tuple[int, int]:
    """Those of a step with a full past: whole, and pruned with what was kept and with the keeping itself."""
    frame = torch.zeros(1, 3, H, W, device=device)
    past = []
    for _ in range(4):
        past = model.remember(frame, past)
    constants, counts = model.constants(frame), []
    for step in (lambda: model.enhance_whole(frame, [frame] * 4),
                 lambda: model.remember(model.enhance(frame, past, constants), past)):
        with FlopCounterMode(display=False) as counter:
            step()
        counts.append(counter.get_total_flops())
    return tuple(counts)


@pytest.mark.parametrize("wiring, share", [("release", 0.60), ("paper", 0.75)])
def test_pruned_takes_far_fewer_operations(parts, wiring, share):
    with torch.no_grad():
        whole, pruned = operations(harmonizer(parts, wiring), 64, 64, "cpu")
    assert pruned <= share * whole, f"{pruned:,} of {whole:,}: {pruned / whole:.3f}"


def test_pruned_takes_far_fewer_operations_at_the_releases_size():
    """Cosmos' 0.6B and Wan's VAE at 1024x576, counted on the meta device: 22 of 43 tera-operations."""
    with torch.device("meta"):
        model = Harmonizer(WanVAE(), CosmosDiT()).requires_grad_(False).eval()
    with torch.no_grad():
        whole, pruned = operations(model, 576, 1024, "meta")
    assert pruned <= 0.60 * whole, f"{pruned:,} of {whole:,}: {pruned / whole:.3f}"
    assert 40e12 < whole < 45e12


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_saved_harmonizer_loads_with_its_wiring_and_a_setting_may_replace_it(parts, tmp_path):
    model, x = harmonizer(parts, "paper", past=3, sigma=0.5), video(3, 16, 16)
    model.save_pretrained(tmp_path)
    again = Harmonizer.from_pretrained(tmp_path)
    assert again.settings == Settings("paper", 3, 0.5) and not any(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        close(again(x), model(x), 1e-6)
    assert Harmonizer.from_pretrained(tmp_path, wiring="release", past=4).settings == Settings("release", 4, 0.5)
    changing = Harmonizer.from_pretrained(tmp_path, change_only="yes")
    assert changing.settings == Settings("paper", 3, 0.5, change_only=True)
    changing.save_pretrained(tmp_path / "changing")
    assert Harmonizer.from_pretrained(tmp_path / "changing").settings.change_only
    assert not Harmonizer.from_pretrained(tmp_path / "changing", change_only="no").settings.change_only


def test_parts_of_two_types_compute_in_the_transformers(parts, tmp_path):
    model = harmonizer(parts)
    deepcopy(model.vae).bfloat16().save_pretrained(tmp_path / "wan")
    model.save_pretrained(tmp_path / "harmonizer", vae="../wan")
    again = Harmonizer.from_pretrained(tmp_path / "harmonizer")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    with torch.no_grad():
        assert again(video(1, 16, 16)).shape == (1, 3, 1, 16, 16)


def test_the_vae_may_be_another_folders(parts, tmp_path):
    model, x = harmonizer(parts), video(2, 16, 16)
    model.vae.save_pretrained(tmp_path / "wan")
    model.save_pretrained(tmp_path / "harmonizer", vae="../wan")
    assert not (tmp_path / "harmonizer" / "vae").exists()
    with torch.no_grad():
        close(Harmonizer.from_pretrained(tmp_path / "harmonizer")(x), model(x), 1e-6)


def test_training_begins_at_published_folders(parts, tmp_path):
    vae, dit = parts
    vae.save_pretrained(tmp_path / "wan" / "vae")
    dit.save_pretrained(tmp_path / "cosmos" / "transformer")
    for cosmos, wan in (("cosmos", "wan"), ("cosmos/transformer", "wan/vae")):
        model = Harmonizer.from_base(tmp_path / cosmos, tmp_path / wan, wiring="paper")
        assert model.settings.wiring == "paper" and torch.equal(model.dit.proj_out.weight, dit.proj_out.weight)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    for name in ("diffusion_harmonizer.pkl", "model.pt"):
        with pytest.raises(ValueError, match=rf"{name}: not loaded, .*unpickling .*python convert\.py FILE FOLDER"):
            Harmonizer.from_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=r"unpickling .*convert\.py"):
            Harmonizer.from_base(tmp_path / name, tmp_path / name)


def test_a_harmonizer_is_read_from_the_hub_whole(parts, tmp_path, monkeypatch):
    """Its parts are asked for by the id and their subfolders."""
    model, asked = harmonizer(parts), []
    model.save_pretrained(tmp_path)

    def download(repo, subfolder, config="config.json", **hub):
        asked.append((repo, subfolder, config))
        return tmp_path
    monkeypatch.setattr(weights, "download", download)
    again = Harmonizer.from_pretrained("org/harmonizer")
    assert again.settings == model.settings and torch.equal(again.dit.proj_out.weight, model.dit.proj_out.weight)
    assert asked == [("org/harmonizer", None, "model_index.json"), ("org/harmonizer", "vae", "config.json"),
                     ("org/harmonizer", "transformer", "config.json")]


@pytest.mark.parametrize("change, said", [({"_class_name": "Mirage"}, "wanted _class_name 'Harmonizer', got 'Mirage'"),
                                          ({"wiring": "new"}, "wiring: wanted one of 'release', 'paper', got 'new'"),
                                          ({"past": -1}, "past: wanted an integer from 0 to 64, got -1"),
                                          ({"past": 3}, "past must be a multiple of 4"), ({"sigma": "a"}, "sigma"),
                                          ({"sigma": 0}, "sigma"), ({"vae": 3}, "vae: wanted text"),
                                          ({"vae": "nowhere"}, "nowhere: no such folder")])
def test_a_folder_that_says_something_else_is_refused_in_one_line(parts, tmp_path, change, said):
    harmonizer(parts).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        Harmonizer.from_pretrained(tmp_path)
    assert said in str(error.value)
