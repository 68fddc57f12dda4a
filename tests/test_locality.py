"""ChopGrad's figures: influence, its decay, what truncation and tiles cost, and the bytes that are held."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from experiments import chopgrad_locality as locality
from experiments import chopgrad_memory as memory
from experiments import walkthrough_figures
from mirage_min.data.toy_world import WorldConfig, make_clip
from mirage_min.method import chopgrad
from mirage_min.method.schedules import WAN
from mirage_min.networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from mirage_min.networks.vae_wan import WanVAE, WanVAEConfig
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from tests import small


class Recurrence:
    """A decoder whose Jacobian is known: x_i = gain · c_i, c_i = z_i + decay · c_{i-1}, one latent a group.

    |dx_i / dz_j|_F = gain · decay^(i - j) · √n for groups of n numbers.
    """

    def __init__(self, gain: float, decay: float):
        self.gain, self.decay = gain, decay

    def decode_groups(self, F: int) -> list[slice]:
        return [slice(i, i + 1) for i in range(F)]

    def decode_group(self, z, cache=None, inject=None):
        c = z if cache is None else z + self.decay * cache["c"]
        return self.gain * c, {"c": c}


def test_influence_is_the_norm_of_the_jacobian_whatever_the_number_of_probes():
    """ChopGrad Eq. 2. Of 400 numbers one probe's square is right to 7 %."""
    torch.manual_seed(0)
    z = torch.randn(1, 4, 5, 10, 10)
    for probes in (1, 16):
        samples = locality.influence(Recurrence(3.0, 0.5), z, probes)
        assert [d for d, _ in samples] == [i - j for i in range(5) for j in range(i + 1)]
        for distance, found in samples:
            wanted = 3.0 * 0.5**distance * 20
            assert found == pytest.approx(wanted, rel=0.15), f"{probes} probes, distance {distance}: {found}, {wanted}"


def test_the_fit_is_the_decay_that_the_means_have():
    """ChopGrad Eq. 3, exactly; a positive alpha is a decay, a negative one growth."""
    for C, alpha in ((3.0, 1.2), (0.5, -0.4)):
        fit = locality.exponential_fit([C * math.exp(-alpha * D) for D in range(5)])
        assert fit["C"] == pytest.approx(C, rel=1e-4) and fit["alpha"] == pytest.approx(alpha, rel=1e-4)
        assert fit["R2"] == pytest.approx(1, abs=1e-5)
    y = torch.tensor([2.0, 1.5, 0.2, 0.3])
    fit = locality.exponential_fit(y.tolist())
    grid = [(C, a) for C in torch.linspace(0.5, 5, 91).tolist() for a in torch.linspace(0, 2, 101).tolist()]
    squares = {(C, a): (y.log() - math.log(C) + a * torch.arange(4)).square().sum().item() for C, a in grid}
    best = min(squares, key=squares.get)
    assert (fit["C"], fit["alpha"]) == pytest.approx(best, abs=0.06), f"{fit}, by trying {best}"
    assert fit["R2"] == pytest.approx(1 - squares[best] / (y.log().var(correction=0) * 4).item(), abs=0.01)


def test_influences_are_averaged_by_distance_and_rows_over_clips():
    assert locality.means_by_distance([(0, 2.0), (1, 1.0), (0, 4.0), (2, 0.5), (1, 3.0)]) == [3.0, 2.0, 0.5]
    rows = locality.average([[{"d": 0, "e": 1.0}, {"d": 1, "e": 5.0}], [{"d": 0, "e": 3.0}]])
    assert rows == [{"d": 0, "e": 2.0}], "the second row is not in both"


@pytest.fixture(scope="module")
def vae():
    return memory.small_decoder("CogVideoX").eval()


def test_truncation_is_measured_against_full_backpropagation(vae):
    """ChopGrad Eq. 6, by plain autograd, and nothing is missing at the largest distance."""
    torch.manual_seed(0)
    z, x_gt = torch.randn(1, 16, 7, 2, 2), torch.rand(1, 3, 25, 16, 16)
    rows = locality.truncation(vae, z, locality.mse_to(x_gt))
    vae.zero_grad()
    leaf = z.clone().requires_grad_()
    (vae.decode(leaf) - x_gt).square().mean().backward()
    full, full_p = leaf.grad, torch.cat([p.grad.flatten() for p in vae.decoder.parameters()])
    assert [row["d_trunc"] for row in rows] == [0, 1, 2]
    for row in rows:
        vae.zero_grad()
        _, g = chopgrad.backward(vae, z, locality.mse_to(x_gt), d_trunc=row["d_trunc"])
        g_p = torch.cat([p.grad.flatten() for p in vae.decoder.parameters()])
        wanted = {"z_absolute": (g - full).norm(), "z_relative": (g - full).norm() / full.norm(),
                  "z_cosine": (g * full).sum() / g.norm() / full.norm(),
                  "parameters_nmae": (g_p - full_p).abs().sum() / full_p.abs().sum(),
                  "parameters_cosine": (g_p * full_p).sum() / g_p.norm() / full_p.norm()}
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), f"d_trunc {row['d_trunc']}: {key}"
    assert rows[0]["z_relative"] > 0.05 and rows[2]["z_relative"] < 1e-5


def test_a_world_models_transformer_is_a_backbone_with_its_own_vae(tmp_path):
    world = small.world(latents=2)
    world.vae.save_pretrained(tmp_path / "vae")
    world.save_pretrained(tmp_path / "model", "../vae")
    restorer = locality.read_backbone(tmp_path / "model", tmp_path / "none")
    z = torch.randn(1, world.vae.config.z_dim, 2, 4, 4)
    with torch.no_grad():
        wanted = z - world.dit(z, torch.tensor([200]), world.text)
    assert torch.allclose(restorer.denoise(z), wanted, atol=1e-5)
    assert torch.equal(restorer.vae.post_quant_conv.weight, world.vae.post_quant_conv.weight)


def test_the_backbones_gradients_are_those_of_plain_autograd_averaged_over_the_clips():
    """ChopGrad Fig. 4: full gradients by the graph of the whole clip, and those of d_trunc 0 group by group."""
    torch.manual_seed(0)
    world = small.world()
    restorer = Restorer(world.vae, world.dit, torch.ones(1, 2, 8), WAN, Settings("artifacts"))
    clips = [torch.rand(1, 3, 9, 32, 32) * 2 - 1 for _ in range(2)]
    rows = locality.backbone(restorer, clips)
    assert [row["d_trunc"] for row in rows] == [0, 1, 2]
    found, params = {}, list(restorer.dit.parameters())
    for name in ("full", "alone"):
        loss = 0
        for x in clips:
            with torch.no_grad():
                z_in = world.vae.encode(locality.without_detail(x))
            z, cache, decoded = restorer.denoise(z_in), None, []
            for group in world.vae.decode_groups(z.shape[2]):
                x_g, cache = world.vae.decode_group(z[:, :, group], cache)
                decoded.append(x_g)
                cache = {key: c.detach() for key, c in cache.items()} if name == "alone" else cache
            loss = loss + (torch.cat(decoded, dim=2) - x).square().mean() / 2
        grads = torch.autograd.grad(loss, params, materialize_grads=True)
        found[name] = torch.cat([g.flatten() for g in grads])
    full, alone = found.values()
    wanted = {"backbone_nmae": ((alone - full).abs().sum() / full.abs().sum()).item(),
              "backbone_cosine": ((alone * full).sum() / alone.norm() / full.norm()).item()}
    assert {key: rows[0][key] for key in wanted} == pytest.approx(wanted, rel=1e-3), f"{rows[0]}, {wanted}"
    assert rows[0]["backbone_nmae"] > 0.01 and rows[2]["backbone_nmae"] < 1e-4
    assert rows[2]["backbone_cosine"] > 1 - 1e-5


def test_tiles_are_measured_against_the_whole_frame(vae):
    torch.manual_seed(0)
    z, x_gt = torch.randn(1, 16, 3, 2, 4), torch.rand(1, 3, 9, 16, 32)
    whole = locality.tiling(vae, z, x_gt, (1, 1))
    assert [row["margin"] for row in whole] == [0, 1]
    assert max(row["pixels_max"] for row in whole) == 0 and min(row["z_cosine"] for row in whole) > 1 - 1e-6
    row = locality.tiling(vae, z, x_gt, (1, 2))[0]
    with torch.no_grad():
        x, halves = vae.decode(z), torch.cat([vae.decode(z[..., :2]), vae.decode(z[..., 2:])], dim=4)
    assert row["pixels_rms"] == pytest.approx(((halves - x).square().mean().sqrt() / x.std()).item(), rel=1e-4)
    assert row["pixels_max"] == pytest.approx(((halves - x).abs().max() / x.std()).item(), rel=1e-4)
    assert row["z_relative"] > 0.01 and row["z_cosine"] < 0.9999


def test_tiles_are_compared_on_the_first_three_groups_alone(vae):
    torch.manual_seed(0)
    z, x_gt = torch.randn(1, 16, 9, 1, 2), torch.rand(1, 3, 33, 8, 16)  # four groups; the third ends with latent 7
    found, wanted = (locality.tiling(vae, *clip, (1, 2)) for clip in ((z, x_gt), (z[:, :, :7], x_gt[:, :, :25])))
    for row, same in zip(found, wanted, strict=True):
        assert row == pytest.approx(same, rel=1e-4)


def test_made_up_clips_are_held_out_and_as_long_as_the_vae_takes_them(vae):
    clips = locality.made_up_clips(vae, 2, 4, 32, 48)
    assert [list(x.shape) for x in clips] == [[1, 3, 9, 32, 48]] * 2 and not torch.equal(*clips)
    assert torch.equal(clips[0][0], make_clip(1_000_000, WorldConfig(9, 32, 48), extras=False).x_gt)


def test_a_clip_has_the_frames_that_the_vae_takes_and_the_size_that_is_asked_for(vae, monkeypatch):
    x = torch.rand(3, 13, 8, 12)
    monkeypatch.setattr(locality, "read_clip", lambda path: x)
    clip = locality.load_clip("a.mp4", vae, 12, 4, 6)
    assert clip.shape == (1, 3, 9, 4, 6)
    assert torch.allclose(clip[0, :, 3, 1, 2], x[:, 3, 2:4, 4:6].mean(dim=(1, 2)))
    x = x[:, :9]
    assert locality.load_clip("a.mp4", vae, 12, 4, 6).shape == (1, 3, 9, 4, 6), "all of them, where all are legal"
    assert locality.load_clip("a.mp4", vae, 8, 4, 6).shape == (1, 3, 1, 4, 6)


def test_the_shares_of_pieces_add_up_to_the_loss_of_the_clip(monkeypatch):
    """MSE over all numbers; LPIPS, here of each frame its mean difference, over the frames."""
    monkeypatch.setattr(locality, "Features", lambda *given: None)
    monkeypatch.setattr(locality, "Lpips", lambda net: lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
    x, x_gt = torch.rand(2, 1, 3, 7, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = {locality.mse_to(x_gt): (x - x_gt).square().mean(), locality.lpips_to(x_gt, None): (x - x_gt).abs().mean()}
    for loss_fn, wanted in whole.items():
        pieces = [(slice(None), slice(None), frames) for frames in (slice(0, 1), slice(1, 5), slice(5, 7))]
        assert sum(loss_fn(x[piece], piece) for piece in pieces).item() == pytest.approx(wanted.item())


def test_both_kinds_of_vae_are_read_from_their_folders_and_another_is_refused(tmp_path):
    CogVideoXVAE(CogVideoXVAEConfig(3, 3, (4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
                 ).save_pretrained(tmp_path / "a")
    WanVAE(WanVAEConfig(base_dim=4, num_res_blocks=1)).save_pretrained(tmp_path / "b")
    assert isinstance(locality.load_vae(tmp_path / "a"), CogVideoXVAE)
    assert isinstance(locality.load_vae(tmp_path / "b"), WanVAE)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="wanted one of .*got AutoencoderKL"):
        locality.load_vae(tmp_path / "c")


def test_all_three_measurements_are_written_as_text_numbers_and_a_picture(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(locality, "load_vae", lambda folder: vae)
    monkeypatch.setattr(locality, "made_up_clips", lambda vae, count, *size: [torch.rand(1, 3, *size) * 2 - 1])
    monkeypatch.setattr(locality.Restorer, "from_base", lambda *given, **settings: None)
    rows = [{"d_trunc": 0, "backbone_nmae": 0.25, "backbone_cosine": 0.875}]
    monkeypatch.setattr(locality, "backbone", lambda restorer, clips: rows)
    args = ["--vae", "x", "--label", "small", "--frames", "17", "--size", "16", "16", "--probes", "1", "--threads", "1"]
    locality.main(locality.flags().parse_args([*args, "--backbone", "y", "--out", str(tmp_path)]))
    names = sorted(path.name for path in (tmp_path / "chopgrad").iterdir())
    assert names == [f"locality_small.{kind}" for kind in ("json", "md", "png")]
    text = (tmp_path / "chopgrad" / "locality_small.md").read_text()
    assert text.startswith("# Temporal locality, truncation and tiles: small\n") and "Clips of 17x16x16" in text
    result = json.loads((tmp_path / "chopgrad" / "locality_small.json").read_text())
    assert f"Influence by distance: {result['mean'][0]:.3g}, {result['mean'][1]:.3g}" in text
    row = result["truncation"]["mse"][0]
    assert f"| {' | '.join(f'{value:.4g}' for value in row.values())} |" in text and "| tiles: margin |" in text
    assert "| backbone, mse: d_trunc | backbone_nmae | backbone_cosine |" in text and "| 0 | 0.25 | 0.875 |" in text
    with pytest.raises(ValueError, match="leave out --random"):
        locality.main(locality.flags().parse_args([*args, "--backbone", "y", "--random"]))
    result["fit"] = {"C": 2.0, "alpha": 0.5, "R2": 0.9}
    assert "Fit C exp(-alpha D): C 2, alpha 0.5, R2 0.9" in locality.report(result, "small")


# ---- bytes -----------------------------------------------------------------------------------------------------------

def test_the_bytes_counted_are_those_of_autograd_or_of_chopgrad(vae):
    z = memory.latents(17, 1, 1, vae)
    assert z.shape == (1, 16, 5, 1, 1)
    autograd, chopped, wide = (memory.peak(vae, z, **method) for method in ({}, {"d_trunc": 0}, {"d_trunc": 1}))
    assert 1.5 * chopped < autograd and 1.5 * chopped < wide, f"{autograd}, d_trunc 0 {chopped}, d_trunc 1 {wide}"
    assert all(p.grad is None for p in vae.parameters())


def test_the_spread_is_over_lengths_that_fill_the_window(monkeypatch):
    """With 9 + 8 d frames d + 1 groups are full; before that less is held."""
    def held(vae, z, d_trunc=None, delayed=False):
        frames = 4 * (z.shape[2] - 1) + 1
        return 100 * frames if d_trunc is None else min(frames, 9 + 8 * d_trunc) + (frames == 33)
    monkeypatch.setattr(memory, "peak", held)
    monkeypatch.setattr(memory, "seconds", lambda vae, z, repeat, **method: 0.004 * (z.shape[2] - 1) + 0.001)
    table = memory.by_length("CogVideoX", 1, 1, lengths=(9, 17, 25, 33), timed=(9, 17))
    assert list(table["bytes"]) == ["autograd", *table["spread"]] and len(table["spread"]) == 6
    for method, spread in table["spread"].items():
        assert spread == pytest.approx(1 / (9 + 8 * int(method[2]))), method
    assert table["ms_per_frame"]["d=2, delayed"] == pytest.approx([1.0, 1.0])
    text = memory.length_table("CogVideoX", table)
    assert f"| autograd | {900 / 2**20:.1f} | {2500 / 2**20:.1f} |  | 1.0 | 1.00 |" in text


def test_the_frames_that_fit_without_chopgrad_are_those_of_a_line_through_the_last_lengths():
    row = {"weights": memory.GIB, "autograd": {1: 2 * memory.GIB, 9: 10 * memory.GIB, 17: 20 * memory.GIB,
                                               25: 30 * memory.GIB}}
    assert memory.frames_within(row, 31.0) == 25 and memory.frames_within(row, 41.0) == 33
    assert memory.frames_within(row, 30.9) == 17 and memory.frames_within(row, 11.0) == 9
    assert memory.frames_within(row, 10.9) == 1 and memory.frames_within(row, 2.9) == 0


def test_the_full_sizes_are_counted_for_whole_frames_and_for_the_largest_tile(vae, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda vae, z, **method: (tuple(z.shape[2:]), method.get("d_trunc")))
    row = memory.bytes_at_size(vae, 3, 5)
    assert row["autograd"] == {T: ((F, 3, 5), None) for T, F in ((1, 1), (9, 3), (17, 5), (25, 7))}
    assert row["d_trunc"] == {tiles: [((7, *size), d) for d in (0, 1, 2)]
                              for tiles, size in (("1x1", (3, 5)), ("2x2", (2, 3)), ("4x4", (1, 2)))}
    z, cache = memory.latents(25, 3, 5, vae), None
    with torch.no_grad():
        for group in vae.decode_groups(7):
            _, cache = vae.decode_group(z[:, :, group], cache)
    assert row["cache"] == sum(c.nbytes for c in cache.values())


def test_the_tables_have_the_figures_and_checkpointing_costs_two_caches():
    table = {"frames": 97, "groups": 12, "d_trunc": [0, 1], "autograd": {"bytes": 2**20, "seconds": 1.0},
             "plain": {"bytes": [2**20, 2**21], "seconds": [0.5, 0.25], "passes": [12, 23]},
             "delayed": {"bytes": [3 * 2**20, 2**22], "seconds": [1, 2], "passes": [12, 22]}}
    text = memory.distance_table("Wan", table)
    assert "12 groups" in text and "| 1 | 2.0 | 4.0 | 0.25 | 2.00 | 23 | 22 |" in text
    G = memory.GIB
    size = {"vae": "WanVAE", "size": [480, 832], "weights": G, "cache": G,
            "autograd": {1: G, 9: 10 * G, 17: 20 * G, 25: 30 * G},
            "d_trunc": {"1x1": [8 * G, 12 * G, 16 * G], "2x2": [2 * G, 3 * G, 4 * G]}}
    text = memory.full_size_table([size])
    assert "| WanVAE | 480x832 | 10.0 | 30.0 | 17 | 57 | 1x1 | 8.0 | 12.0 | 16.0 | 10.0 |" in text
    assert "| 2x2 | 2.0 | 3.0 | 4.0 | 2.5 |" in text, "a tile's cache is a quarter of the frame's"


def test_seconds_are_the_best_of_the_turns(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr(memory.time, "process_time", lambda: next(clock))
    vae = SimpleNamespace(zero_grad=lambda: None)
    monkeypatch.setattr(memory, "step", lambda *args: None)
    assert memory.seconds(vae, None, 2) == 1.0


def test_the_walkthroughs_map_is_each_groups_influence_of_that_of_its_own():
    torch.manual_seed(0)
    table = walkthrough_figures.influence_table(Recurrence(3.0, 0.5), torch.randn(1, 4, 4, 10, 10), probes=8)
    wanted = torch.tensor([[0.5 ** (i - j) if j <= i else 0 for j in range(4)] for i in range(4)])
    assert torch.allclose(table, wanted, atol=0.1), f"largest difference {(table - wanted).abs().max():.2f}"
