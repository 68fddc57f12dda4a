"""Mirage Table 4 and Figure 6 in the small: what stage A adds to stage H, and why skips of the 3D encoder do not.

    python -m experiments.mirage_table4 --perceptual DIR

    H               stage H alone: train_harmonize.py on a stage A of no steps (blocks and LoRA at zero change nothing)
    H, 3D skips     the same, and features of the 3D encoder through zero-initialised 1 x 1 convolutions: Enc-1 at H
                    into Dec-4, Enc-2 at H/2 into Dec-3, whose 5 frames are repeated as the decoder repeats its own
    A + H           both stages, by their scripts

mirage_fig6.png: channel means of Enc-1, of the 2D encoder and of Dec-4 at frame 7 of a clip of 9 (after the paper's
Fig. 6), and how far each feature of frame 7 changes when noise is added to frame j of the input, relative to j = 7.
What a 2D encoder sees changes with its own frame alone; what the 3D encoder says of frame 7 changes with earlier frames
too, and through skips that is ghosting. mirage_ghosting.png: frame 7 of the first clip as each method makes it, and
below it the mean absolute difference to the truth.

The paper trains 10,000 steps a stage with LPIPS on VGG; here it is the recipe `small` (SqueezeNet, Gram, MSE).
"""

import matplotlib
import torch
from einops import rearrange
from torch import nn

from experiments import common
from mirage_min.data.video import from_bytes
from mirage_min.method import lora
from mirage_min.networks import weights
from mirage_min.systems.mirage import HARMONISATION, TRANSFORMER, Mirage

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

PAPER = {"H": {"PSNR": 27.89, "LPIPS": 0.083, "vFID": 0.206},
         "H, 3D skips": {"PSNR": 27.50, "LPIPS": 0.099, "vFID": 0.249},
         "A + H": {"PSNR": 28.60, "LPIPS": 0.069, "vFID": 0.178}}
LR = 1e-3  # of recipe `small`


def h_alone(args, seed: int) -> Mirage:
    """Stage H on a stage A of no steps."""
    def make(to):
        common.stage_a(args, to, seed, steps=0)
        common.stage_h(args, to, to, seed)
    return Mirage.from_pretrained(common.once(args.runs / "h_alone" / f"seed_{seed}", common.trained_with(args), make))


def encoder_features(vae, x):
    """Enc-1 and Enc-2, just before their downsamplings [B, C0, 9, H, W], [B, C1, 5, H/2, W/2], of one group."""
    found, hooks = [], []
    for stage in vae.encoder.down_blocks[:2]:
        # the downsampling is the stage's last layer: what goes into it is the feature
        hooks.append(stage.layers[-1].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0])))
    vae.encode_group(x)
    for hook in hooks:
        hook.remove()
    return found


class Skips(nn.Module):
    """The 3D encoder's features for Dec-4 and Dec-3, through 1 x 1 convolutions."""

    def __init__(self, vae):
        super().__init__()
        c = vae.config.block_out_channels
        self.convs = nn.ModuleList(nn.Conv3d(a, b, 1, bias=False) for a, b in zip(c[:2], vae.inject_channels))
        for conv in self.convs:
            nn.init.zeros_(conv.weight)

    def forward(self, features):
        fine, coarse = features
        # Dec-3 has 9 frames where Enc-2 has 5: the first stays, the others are doubled, as in the decoder's upsampling
        coarse = torch.cat([coarse[:, :, :1], coarse[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        return [conv(f) for conv, f in zip(self.convs, (fine, coarse))]


class Add(nn.Module):
    """Takes a fusion block's place in the decoder: h + f."""

    def forward(self, h, f):
        return h + f.to(h.dtype)


def with_skips(args, seed: int) -> Mirage:
    """Stage H with 3D skips, which no script offers."""
    torch.manual_seed(seed)
    mirage = Mirage.from_base(args.weights / "base", args.weights / "vae_2d")
    mirage.vae.fusion = nn.ModuleList([Add(), Add()])
    mirage.add_lora(TRANSFORMER, 32, 32.0)
    mirage.add_lora(HARMONISATION, 16, 16.0)
    mirage.skips = Skips(mirage.vae)

    def mids(x):
        with torch.no_grad():
            features = encoder_features(mirage.vae, x)
        return mirage.skips([f.detach() for f in features])

    mirage.mids = mids
    params = [*lora.parameters(mirage.dit, TRANSFORMER), *lora.parameters(mirage.vae.decoder, HARMONISATION),
              *mirage.skips.parameters()]
    judge = common.perceptual_loss(args, gram=0.1, mse=2.0)
    common.train(params, lambda x_ni, x_gt: judge(mirage(x_ni), x_gt), args, seed, LR, size=(96, 144))
    return mirage


@torch.no_grad()
def figure_6(args, clips) -> dict[str, list[float]]:
    """The picture, and each feature's reaction at frame 7 to each frame of the input."""
    mirage, t = Mirage.from_base(args.weights / "base", args.weights / "vae_2d"), 7
    x = from_bytes(weights.load_tensors(min(clips.glob("*.safetensors")))[0]["x_gt"][None])

    def features(x):
        seen = []
        hook = mirage.vae.decoder.up_blocks[-1].layers[0].register_forward_pre_hook(lambda m, i: seen.append(i[0]))
        mirage.vae.decode(mirage.vae.encode(x))
        hook.remove()
        return {"Enc-1": encoder_features(mirage.vae, x)[0], "Enc-2 (t = 4 of 5)": encoder_features(mirage.vae, x)[1],
                "2D encoder": mirage.mids(x)[0], "Dec-4": seen[0]}

    def at(feature):
        return feature[0, :, t if feature.shape[2] == 9 else 4].float()

    clean, reaction = features(x), {}
    noise = 0.1 * torch.randn(x[:, :, 0].shape, generator=torch.Generator().manual_seed(0))
    for j in range(9):
        moved = x.clone()
        moved[:, :, j] += noise
        for name, feature in features(moved).items():
            reaction.setdefault(name, []).append((at(feature) - at(clean[name])).norm().item())
    reaction = {name: [v / max(values[t], 1e-12) for v in values] for name, values in reaction.items()}

    figure, axes = plt.subplots(1, 6, figsize=(18, 2.6), layout="constrained")
    for axis, frame in zip(axes, (5, t)):
        axis.imshow(rearrange((x[0, :, frame] + 1) / 2, "c h w -> h w c"))
        axis.set_title(f"input, frame {frame}")
    for axis, name in zip(axes[2:], ("Enc-1", "2D encoder", "Dec-4")):
        axis.imshow(at(clean[name]).mean(0), cmap="viridis")
        axis.set_title(f"{name}, frame {t}")
    for axis in axes[:5]:
        axis.set_axis_off()
    for name, values in reaction.items():
        axes[5].plot(values, marker=".", label=name)
    axes[5].set(xlabel="changed input frame", title=f"reaction of frame {t}, relative")
    axes[5].legend(fontsize=7)
    args.out.mkdir(parents=True, exist_ok=True)
    with weights.whole_file(args.out / "mirage_fig6.png") as file:
        figure.savefig(file, format="png", dpi=80)
    return reaction


def ghosting(args, clips, results) -> None:
    """Frame 7 of the first clip by each method, and its difference to the truth."""
    path = min(clips.glob("*.safetensors"))
    y = weights.load_tensors(path)[0]["x_gt"][:, 7]
    figure, axes = plt.subplots(2, len(results), figsize=(4 * len(results), 5.5), layout="constrained")
    for column, (name, folder) in zip(axes.T, results.items()):
        x = weights.load_tensors(folder / path.name)[0]["x_dr"][:, 7]
        column[0].imshow(rearrange(x, "c h w -> h w c"))
        column[0].set_title(name)
        column[1].imshow((x.float() - y.float()).abs().mean(0), cmap="magma", vmin=0, vmax=64)
        for axis in column:
            axis.set_axis_off()
    with weights.whole_file(args.out / "mirage_ghosting.png") as file:
        figure.savefig(file, format="png", dpi=80)


def main(args) -> None:
    clips, seeds = common.held_out(args), []
    methods = {"H": h_alone, "H, 3D skips": with_skips,
               "A + H": lambda args, seed: Mirage.from_pretrained(common.harmonised(args, seed))}
    reaction = figure_6(args, clips)
    for seed in range(1, args.seeds + 1):
        folder = args.runs / "mirage_table4" / f"seed_{seed}"

        def make(to, train):
            mirage = train(args, seed)
            common.predict(clips, to, lambda x_ni, x_gt: mirage(x_ni))
        results = {name: common.once(folder / name, common.scored_on(args), lambda to: make(to, train))
                   for name, train in methods.items()}
        seeds.append(common.evaluate(args, clips, results, folder / "scores"))
    ghosting(args, clips, results)
    common.report("mirage_table4", __doc__, args, {"full frame": PAPER}, seeds, {"reaction of frame 7": reaction})


if __name__ == "__main__":
    main(common.arguments(__doc__, steps=100))
