"""The Wan transformer's side branch against diffusers' on the same weights, at one timestep and at several."""

import pytest
import torch
from torch import nn

from tests.test_dit_wan import close, original_skeleton, randomise, shapes
from tests.torchvision_stub import stub

stub()

from diffusers import WanVACETransformer3DModel  # noqa: E402

from mirage_min.networks.dit_wan import WanDiT, WanDiTConfig  # noqa: E402
from mirage_min.networks.wan_branch import WanBranch, WanBranchConfig  # noqa: E402

SMALL = dict(num_attention_heads=2, attention_head_dim=12, in_channels=6, out_channels=6, text_dim=16, freq_dim=32,
             ffn_dim=32, num_layers=3)
LAYERS = dict(vace_layers=(0, 2), vace_in_channels=7)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(diffusers' whole, our transformer, our branch) in float64; the branch was read from diffusers' folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vace")
    reference = WanVACETransformer3DModel(**SMALL, **LAYERS)
    randomise(reference)
    reference.save_pretrained(folder)
    dit = WanDiT(WanDiTConfig(**SMALL))
    dit.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("vace_")})
    return reference.double().eval(), dit.double().eval(), WanBranch.from_pretrained(folder, dtype=torch.float64)


def inputs(n=3, h=4, w=6):
    torch.manual_seed(2)
    like = dict(dtype=torch.float64)
    z, control = torch.randn(2, 6, n, h, w, **like), torch.randn(2, 7, n, h, w, **like)
    return z, torch.tensor([200, 731]), torch.randn(2, 5, 16, **like), control


def test_matches_the_published_transformer_with_its_branch(models):
    reference, dit, branch = models
    z, t, text, control = inputs()
    with torch.no_grad():
        theirs = reference(z, t, text, control_hidden_states=control, return_dict=False)[0]
        hints = branch(dit, z, t, text, control)
        assert list(hints) == [0, 2]
        close(dit(z, t, text, hints), theirs, 1e-5)
        assert (dit(z, t, text) - theirs).abs().max() > 0.1 * theirs.std(), "the hints say nothing"


def test_gradients_match_the_published_ones_with_and_without_checkpointing(models):
    reference, dit, branch = models
    z, t, text, control = inputs()
    theirs = torch.autograd.grad(
        reference(z, t, text, control_hidden_states=control.requires_grad_(), return_dict=False)[0].square().sum(),
        [control, *reference.vace_blocks[0].proj_in.parameters(), *reference.vace_blocks[1].attn1.to_q.parameters()])
    for branch.activation_checkpointing in (True, False):
        out = dit(z, t, text, branch(dit, z, t, text, control))
        ours = torch.autograd.grad(out.square().sum(), [
            control, *branch.vace_blocks[0].proj_in.parameters(), *branch.vace_blocks[1].attn1.to_q.parameters()])
        for a, b in zip(ours, theirs):
            close(a, b, 1e-5)


def test_the_same_timestep_for_each_latent_is_one_timestep(models):
    _, dit, branch = models
    z, t, text, control = inputs()
    each = t[:, None].expand(2, 3)
    with torch.no_grad():
        close(dit(z, each, text, branch(dit, z, each, text, control)),
              dit(z, t, text, branch(dit, z, t, text, control)), 1e-12)


def test_every_hint_reads_each_latents_own_timestep(models):
    """One block, whose hint before attention mixes frames would change in one latent only: there it changes most."""
    _, dit, branch = models
    z, _, text, control = inputs()
    a, b = torch.tensor([[0, 300, 300]] * 2), torch.tensor([[0, 300, 700]] * 2)
    with torch.no_grad():
        one, other = (branch(dit, z, t, text, control)[0] for t in (a, b))
    change = (one - other).view(2, 3, -1).norm(dim=(0, 2))
    assert change.argmax() == 2 and change[2] > 2 * change[:2].max()


def test_a_new_branch_changes_nothing_and_would_train():
    torch.manual_seed(0)
    dit, branch = WanDiT(WanDiTConfig(**SMALL)).double(), WanBranch(WanBranchConfig(**SMALL, **LAYERS)).double()
    z, t, text, control = inputs(h=5, w=3)
    hints = branch(dit, z, t, text, control)
    plain = dit(z, t, text)
    assert torch.equal(dit(z, t, text, hints), plain) and plain.shape == z.shape
    out = (dit(z, t, text, hints) - torch.ones_like(z)).square().mean()
    out.backward()
    assert all(block.proj_out.weight.grad.abs().max() > 0 for block in branch.vace_blocks)
    assert not branch.vace_patch_embedding.weight.grad.any(), "behind zeros, in the first step"


def test_what_is_saved_is_read_again(models, tmp_path):
    _, dit, branch = models
    branch.save_pretrained(tmp_path)
    again = WanBranch.from_pretrained(tmp_path)
    assert again.config == branch.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), branch.state_dict().values()))


# ---- keys ------------------------------------------------------------------------------------------------------------


def diffsynth_keys(dim: int, ffn_dim: int, blocks: int) -> dict:
    """{name: shape} of DiffSynth's VaceWanModel, which Spatia's files follow: WanModel's blocks and two layers more."""
    tree = original_skeleton(dim, ffn_dim, 256, 4096, blocks, 48, 48)
    found = {f"vace_{name}": shape for name, shape in shapes(tree).items() if name.startswith("blocks.")}
    found |= {f"vace_patch_embedding.{name}": shape
              for name, shape in shapes(nn.Conv3d(96, dim, (1, 2, 2))).items()}
    for i in range(blocks):
        for layer in ("before_proj", "after_proj")[i > 0:]:
            found |= {f"vace_blocks.{i}.{layer}.weight": (dim, dim), f"vace_blocks.{i}.{layer}.bias": (dim,)}
    return found


def test_every_entry_of_a_diffsynth_branch_meets_one_of_ours():
    """At TI2V-5B's size with a branch of eight, as Spatia's."""
    with torch.device("meta"):
        theirs = diffsynth_keys(3072, 14336, 8)
        ours = WanBranch(WanBranchConfig(24, 128, 48, 48, ffn_dim=14336, num_layers=30, vace_layers=range(0, 30, 4)))
    assert {WanBranch.translate_key(name): shape for name, shape in theirs.items()} == shapes(ours)
    assert len(theirs) == len(shapes(ours))


def test_official_vace_14b_has_our_keys_and_shapes():
    """Diffusers' default configuration."""
    with torch.device("meta"):
        theirs, ours = WanVACETransformer3DModel(), WanBranch()
    named = {WanBranch.translate_key(name): shape for name, shape in shapes(theirs).items()}
    named.pop(None)
    assert named == shapes(ours)
    assert {name for name in shapes(theirs) if WanBranch.translate_key(name) is None} == shapes(WanDiT(
        WanDiTConfig(1, 12, num_layers=40))).keys()


def test_a_name_that_is_nobodys_is_left_for_the_strict_loader_to_refuse():
    for name in ("vace_blocks.0.gate.weight", "vace_embedding.weight", "img_emb.proj.0.weight", "score.weight"):
        assert WanBranch.translate_key(name) == name


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 2), (0, 2, 1), (0, 0), (0, 3)])
def test_layers_that_are_not_the_transformers_are_refused(layers):
    with pytest.raises(ValueError, match=r"vace_layers must rise from 0 to at most 2, got"):
        WanBranchConfig(**SMALL, vace_layers=layers)


def test_wrong_shapes_are_named(models):
    _, dit, branch = models
    z, t, text, control = inputs()
    with pytest.raises(ValueError, match=r"control must be .* = \[2, 7, 3, 4, 6\], got \[2, 7, 2, 4, 6\]"):
        branch(dit, z, t, text, control[:, :, 1:])
    wider = WanDiT(WanDiTConfig(**SMALL | dict(attention_head_dim=16))).double()
    with pytest.raises(ValueError, match="the branch is 24 channels wide, the transformer 32"):
        branch(wider, z, t, text, control)
    shallower = WanDiT(WanDiTConfig(**SMALL | dict(num_layers=1))).double()
    with pytest.raises(ValueError, match=r"hints after layers \[.*, 2\], the transformer has 1"):
        branch(shallower, z, t, text, control)
