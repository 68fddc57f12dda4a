"""A system from the hub: a revision for its own repository, a cache and a token for all of its parts. Offline."""

import json
import shutil

import pytest
import torch

from mirage_min.method.schedules import WAN
from mirage_min.networks import hub, weights
from mirage_min.networks.dit_cosmos import CosmosDiT, CosmosDiTConfig
from mirage_min.systems.harmonizer import Harmonizer
from mirage_min.systems.mirage import Mirage
from mirage_min.systems.mirage_folder import RECONSTRUCTION
from mirage_min.systems.r3d2 import R3D2
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from mirage_min.systems.world import World
from tests import small

COMMITS = {"main": "0" * 40, "v2": "2" * 40}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """huggingface_hub without a network, whose own cache is empty."""
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


def put(cache, folder, repo="org/name", edit=lambda folder: None):
    """A folder as a repository in a cache, with `edit` made to its revision v2."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for name, commit in COMMITS.items():
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)
    edit(repository / "snapshots" / COMMITS["v2"])


def save_harmonizer(folder):
    dit = CosmosDiT(CosmosDiTConfig(num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4,
                                    num_layers=1, text_embed_dim=4, adaln_lora_dim=4))
    Harmonizer(small.world().vae, dit).save_pretrained(folder)


def save_restorer(folder):
    world = small.world()
    Restorer(world.vae, world.dit, torch.ones(1, 2, 8), WAN, Settings("artifacts")).save_pretrained(folder)


SYSTEMS = {  # how each is saved, and what of its index v2 changes: (its class, save, {name: another value})
    "Harmonizer": (Harmonizer, save_harmonizer, {"wiring": "paper"}),
    "R3D2": (R3D2, lambda folder: small.r3d2().save_pretrained(folder), {"t": 321}),
    "Restorer": (Restorer, save_restorer, {"t": 321}),
    "World": (World, lambda folder: small.world().save_pretrained(folder), {"steps": 7}),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_read_whole_at_its_revision_from_the_cache_that_is_named(tmp_path, monkeypatch, name):
    System, save, change = SYSTEMS[name]
    save(tmp_path / "saved")

    def edit(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | change))
        file = next(folder.rglob("diffusion_pytorch_model.safetensors"))
        tensors, about = weights.load_tensors(file)
        weights.save_tensors(file, {key: t + 1 for key, t in tensors.items()}, about)
    put(tmp_path / "cache", tmp_path / "saved", edit=edit)
    from huggingface_hub import snapshot_download
    asked = []

    def download(repo, **where):
        asked.append((repo, where["revision"], where["cache_dir"], where["token"]))
        return snapshot_download(repo, **where)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    main = System.from_pretrained("org/name", cache_dir=tmp_path / "cache", token="hf_none")
    assert len(asked) >= 3 and set(asked) == {("org/name", None, tmp_path / "cache", "hf_none")}, "every part alike"
    asked.clear()
    v2 = System.from_pretrained("org/name", revision="v2", cache_dir=tmp_path / "cache")
    assert set(asked) == {("org/name", "v2", tmp_path / "cache", None)}
    (key, value), = change.items()
    for system, wanted in ((main, False), (v2, True)):
        found = vars(getattr(system, "settings", system))[key]
        assert (found == value) == wanted, f"{key} is {found}"
    changed = [k for k, t in main.state_dict().items() if not torch.equal(t, v2.state_dict()[k])]
    assert changed, "one file's weights are another's in v2"
    assert hub.access.get() == {}, "what was said to one system holds for that alone"
    for other in (dict(), dict(cache_dir=tmp_path / "cache", revision="v3")):
        with pytest.raises(ValueError, match="org/name(@v3)?: .*(offline|not whole)"):
            System.from_pretrained("org/name", **other)
    with pytest.raises(ValueError, match="org/name@v2: names a revision, and another is given: main"):
        System.from_pretrained("org/name@v2", revision="main", cache_dir=tmp_path / "cache")


def test_a_mirages_base_is_read_from_the_cache_that_is_named(tmp_path):
    """Its own files are a folder's; the base and the 2D VAE that it names are repositories."""
    small.save_cogvideox(tmp_path)
    for part, repo in (("base", "org/base"), ("vae_2d", "org/vae")):
        put(tmp_path / "cache", tmp_path / part, repo)
    mirage = Mirage.from_base(tmp_path / "base", tmp_path / "vae_2d")
    mirage.add_lora(RECONSTRUCTION, 1, 1.0)
    (tmp_path / "trained").mkdir()
    mirage.save_stage(tmp_path / "trained" / "stage_a.safetensors", [RECONSTRUCTION],
                      {"base": "org/base", "vae2d": "org/vae"}, fusion=True)
    weights.save_tensors(tmp_path / "trained" / "prompt.safetensors", {"text": mirage.text})
    again = Mirage.from_pretrained(tmp_path / "trained", cache_dir=tmp_path / "cache", base="org/base@v2")
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in mirage.state_dict().items())
    with pytest.raises(ValueError, match="org/base: .*offline"):
        Mirage.from_pretrained(tmp_path / "trained")


def test_a_folder_has_no_revision_and_a_name_that_is_no_id_stays(tmp_path):
    assert hub.pinned(tmp_path, "v2") == tmp_path and hub.pinned("no id", "v2") == "no id"
    assert hub.pinned("org/name", None) == "org/name" and hub.pinned("org/name", "v2") == "org/name@v2"
    assert hub.pinned("org/name@v2", "v2") == "org/name@v2"
