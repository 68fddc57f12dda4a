"""experiments/vae_capacity.py: on codes whose worth is known."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as nnf

from experiments import vae_capacity
from mirage_min.networks import small_base


def clips(count, seed):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 9, 32, 48, generator=draws)
    return list((nnf.avg_pool3d(x, 5, stride=1, padding=2) * 2).clamp(-1, 1))


class Linear:
    """A VAE whose latents are `rows` [n, 768] of each block, and which decodes them by `columns` [768, n]."""

    def __init__(self, rows, columns, noise):
        self.rows, self.columns, self.noise = rows, columns, noise

    def posterior(self, x):
        first = x[:, :, :1]
        whole = torch.cat([first, first, first, x], dim=2)
        cells = whole.unflatten(2, (-1, 4)).unflatten(4, (-1, 8)).unflatten(6, (-1, 8))  # b c f t h p w q
        z = torch.einsum("ncTpq,bcfThpwq->bnfhw", self.rows.view(-1, 3, 4, 8, 8), cells)
        return z, torch.full_like(z, 2 * math.log(self.noise))

    def encode(self, x):
        return self.posterior(x)[0]

    def decode(self, z):
        cells = torch.einsum("cTpqn,bnfhw->bcfThpwq", self.columns.view(3, 4, 8, 8, -1), z)
        return cells.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, 3:]


def test_a_linear_code_by_components_is_as_good_as_said_and_one_by_others_is_not():
    fitted, held_out = clips(160, 0), clips(8, 1)
    _, _, directions = vae_capacity.principal(torch.cat([vae_capacity.blocks(x) for x in fitted]).double())
    best = directions[:, :8].float()
    found = vae_capacity.capacity(Linear(best.T, best, noise=1e-3), fitted, held_out)
    assert found["components"] == pytest.approx(found["decoded"], abs=0.1), "up to the mean"
    assert found["components"] - 0.3 < found["linear"] < found["components"] + 3, "neighbours tell something more"
    assert found["numbers"] == found["directions"] == 8
    worse = directions[:, 8:16].float()
    poor = vae_capacity.capacity(Linear(worse.T, worse, noise=1e-3), fitted, held_out)
    assert poor["components"] == found["components"] and poor["decoded"] < found["decoded"] - 1
    assert poor["linear"] < found["linear"] - 1


def test_directions_below_their_noise_do_not_count():
    fitted, held_out = clips(6, 0), clips(1, 1)
    _, std, directions = vae_capacity.principal(torch.cat([vae_capacity.blocks(x) for x in fitted]).double())
    rows = directions[:, :4].T.float() / std[:4, None].float() * torch.tensor([[4.0], [1], [0.25], [0.05]])
    found = vae_capacity.capacity(Linear(rows, rows.T, noise=0.5), fitted, held_out)
    assert found["directions"] == 2 and found["noise"] == pytest.approx([0.5] * 4, rel=1e-4)
    assert found["std"] == sorted(found["std"], reverse=True)


def test_a_block_is_read_from_the_latents_around_it_and_before():
    z = torch.rand(2, 3, 4, 6)
    rows = vae_capacity.features(z)
    assert rows.shape == (2 * 4 * 6, 2 * 2 * 25)
    at = rows[1 * 24 + 2 * 6 + 3].view(2, 2, 5, 5)  # of latent 2, row 2, column 3
    assert torch.equal(at[0, :, :4], z[:, 1, 0:4, 1:6]) and torch.equal(at[1, :, :4], z[:, 2, 0:4, 1:6])
    assert torch.equal(at[1, :, 4], z[:, 2, 3, 1:6]), "beyond the frame its last row"


def test_the_experiment_writes_a_row_for_each_vae(tmp_path, capsys):
    for family in ("cogvideox", "wan"):
        small_base.new_vae(family, width=0.25, norm_groups=4).save_pretrained(tmp_path / family)
    folders = [tmp_path / "cogvideox", tmp_path / "wan"]
    vae_capacity.main(SimpleNamespace(vae=folders, fitted=2, clips=1, out=tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "vae_capacity.json").read_text())
    text = (tmp_path / "out" / "vae_capacity.md").read_text()
    assert list(found) == [str(folder) for folder in folders] and text in capsys.readouterr().out
    for name, each in found.items():
        row, = (line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert row.endswith(f"| {each['decoded']:.1f} | {each['linear']:.1f} | {each['directions']} of 16 |")
    assert len({each["components"] for each in found.values()}) == 1, "the same clips"
