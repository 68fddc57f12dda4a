"""A side branch for the Wan transformer: a second latent video steers the first (VACE; the world model called Mirage).

The control video (for the world model: what its memory shows, and where) is cut into patches and passes a few further
blocks, which see the noised video, the text and the timestep as the transformer's first block does. Each of them gives
a hint, which is added after one of the transformer's layers:

    c_0 = proj_in(patches(control)) + x,   c_k+1 = block_k(c_k),   hint_k = proj_out_k(c_k+1)
    x ← layer_i(x) + hint_k,   i = vace_layers[k]

    hints = branch(dit, z_t, t, text, control)
    prediction = dit(z_t, t, text, hints)

proj_out starts at zero, and with it every hint: a new branch changes nothing. Names are diffusers'
(`WanVACETransformer3DModel`); `translate_key` also reads those of VACE, DiffSynth and Spatia, and skips the
transformer's own tensors, which are in diffusers' files too: WanDiT reads those. Left out: reference frames.

    python -m mirage_min.networks.wan_branch     # a new branch, one with other weights, and their sizes
"""

import re
from dataclasses import dataclass
from typing import Annotated

import torch
from einops import rearrange
from torch import Tensor, nn

from . import weights
from .checked import Within
from .dit_wan import Block, WanDiT, WanDiTConfig, even_size, run_block

Layers = tuple[Annotated[int, Within(0, 999)], ...]
PROJECTIONS = {"before_proj": "proj_in", "after_proj": "proj_out"}  # in other layouts: here
OF_THE_TRANSFORMER = r"(blocks|patch_embedding|condition_embedder|proj_out)\..*|scale_shift_table"


@dataclass
class WanBranchConfig(WanDiTConfig):
    """The fields of the transformer that it steers, with the same values, and two more."""

    vace_layers: Layers = (0, 5, 10, 15, 20, 25, 30, 35)  # the transformer's layers after which a hint is added
    vace_in_channels: int = 96

    def __post_init__(self):
        super().__post_init__()
        layers = list(self.vace_layers)
        if layers != sorted(set(layers)) or layers[0] != 0 or layers[-1] >= self.num_layers:
            raise ValueError(f"vace_layers must rise from 0 to at most {self.num_layers - 1}, got {layers}")


class WanBranch(nn.Module):
    """Hints for a WanDiT. `activation_checkpointing` keeps only the input of each block.

    Published inside `WanVACETransformer3DModel`, and alone in DiffSynth's and Spatia's files. Spatia's come without a
    config.json: it is TI2V-5B's, with this class's name and vace_layers 0, 4, ..., 28.
    """

    CLASS_NAME = "WanVACETransformer3DModel"
    Config = WanBranchConfig
    FIXED = WanDiT.FIXED
    IGNORED = WanDiT.IGNORED
    from_pretrained = classmethod(weights.from_pretrained)
    save_pretrained = weights.save_pretrained

    def __init__(self, config: WanBranchConfig = WanBranchConfig()):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        D = config.num_attention_heads * config.attention_head_dim
        self.vace_patch_embedding = nn.Conv3d(config.vace_in_channels, D, (1, 2, 2), stride=(1, 2, 2))
        self.vace_blocks = nn.ModuleList(BranchBlock(config, D, first=layer == 0) for layer in config.vace_layers)

    def forward(self, dit: WanDiT, z_t: Tensor, t: int | Tensor, text: Tensor, control: Tensor) -> dict[int, Tensor]:
        """Hints for dit(z_t, t, text, hints): {layer: [B, patches, D]}; control [B, vace_in_channels, F, h, w].

        ValueError if control does not fit z_t, and for a branch that is not as wide as the transformer, or gives hints
        after layers that it lacks.
        """
        wanted = [z_t.shape[0], self.config.vace_in_channels, *z_t.shape[2:]]
        if list(control.shape) != wanted:
            raise ValueError(f"control must be [B, C, F, h, w] = {wanted}, got {list(control.shape)}")
        x, text, _, modulation, rotation = dit.embed(z_t, t, text)
        if x.shape[2] != self.vace_patch_embedding.out_channels:
            raise ValueError(f"the branch is {self.vace_patch_embedding.out_channels} channels wide, the transformer "
                             f"{x.shape[2]}")
        if self.config.vace_layers[-1] >= len(dit.blocks):
            raise ValueError(f"the branch gives hints after layers {list(self.config.vace_layers)}, the transformer "
                             f"has {len(dit.blocks)}")
        c = rearrange(self.vace_patch_embedding(even_size(control)), "b d f h w -> b (f h w) d")
        # c_0 = proj_in(patches(control)) + x
        c = self.vace_blocks[0].proj_in(c) + x
        hints = {}
        for layer, block in zip(self.config.vace_layers, self.vace_blocks):
            c = run_block(block, self.activation_checkpointing, c, text, modulation, rotation)
            hints[layer] = block.proj_out(c)
        return hints

    @staticmethod
    def translate_key(name: str) -> str | None:
        """A tensor's name in any layout -> its name here; None for the transformer's own; an unknown one stays."""
        block, rest = re.fullmatch(r"(?:vace_(blocks\.\d+\.))?(.*)", name).groups(default="")
        if block:
            layer, _, parameter = rest.rpartition(".")
            if layer in PROJECTIONS:
                return f"vace_{block}{PROJECTIONS[layer]}.{parameter}"
            return "vace_" + WanDiT.translate_key(block + rest)
        return None if re.fullmatch(OF_THE_TRANSFORMER, WanDiT.translate_key(name)) else name


class BranchBlock(Block):
    """A transformer block with a way in, if it is the first, and a way out, which starts at zero."""

    def __init__(self, config: WanBranchConfig, D: int, first: bool):
        super().__init__(config, D)
        self.proj_in = nn.Linear(D, D) if first else None
        self.proj_out = nn.Linear(D, D)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = WanBranchConfig(num_attention_heads=4, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=128,
                             num_layers=4, vace_layers=(0, 2), vace_in_channels=17)
    dit, branch = WanDiT(config).eval(), WanBranch(config).eval()
    z, control, text = torch.randn(1, 16, 3, 8, 12), torch.randn(1, 17, 3, 8, 12), torch.randn(1, 8, 32)
    with torch.no_grad():
        plain, hints = dit(z, 200, text), branch(dit, z, 200, text, control)
        print(f"hints after layers {list(hints)}, each {list(hints[0].shape)}")
        print(f"a new branch: the prediction changes by {float((dit(z, 200, text, hints) - plain).abs().max()):.0e}")
        for block in branch.vace_blocks:
            nn.init.normal_(block.proj_out.weight, std=0.1)
        hints = branch(dit, z, 200, text, control)
        print(f"with other weights, on average by {float((dit(z, 200, text, hints) - plain).abs().mean()):.3f}")
    with torch.device("meta"):
        five_b = dict(num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30)
        for every in (2, 4):
            large = WanBranch(WanBranchConfig(**five_b, vace_layers=tuple(range(0, 30, every))))
            print(f"for TI2V-5B, after one layer in {every}: {sum(p.numel() for p in large.parameters()) / 1e9:.2f} G "
                  "parameters")
