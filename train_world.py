"""Train the world model called Mirage (arXiv 2606.09828): a video model learns to continue what a memory shows it.

    z_σ = (1 − σ) z + σ ε,   v = dit(z_σ, 1000 σ, hints),   hints = branch(z_σ, 1000 σ, control)
    L   = mean (v − (ε − z))²                  over all latents of a chunk but the first, which is given at σ = 0

`control` is what the memory shows at each latent's camera, and where; the memory holds latents of the clip itself, put
into the world by its depth and cameras. Each latent has its own σ, drawn evenly and shifted towards 1 (flow.py).

    base     the transformer alone, without a memory: for a small one that knows nothing yet. The paper starts from Wan
    branch   stage 1: the side branch, the rest is frozen
    lora     stage 2: the branch and a LoRA on the transformer's self-attention, which is merged in what is written

    python -m mirage_min.data.toy_world --out data/toy --clips 600
    python -m mirage_min.data.toy_world --out data/world --clips 300 --frames 17 --path out_and_back --static --extras
    python train_world.py base   --vae weights/vae_wan --data data/toy   --out my_base
    python train_world.py branch --vae weights/vae_wan --data data/world --out my_branch --base my_base
    python train_world.py lora   --vae weights/vae_wan --data data/world --out my_world  --base my_branch
    torchrun --nproc-per-node=8 train_world.py branch --recipe paper --prompt FILE --data clips --out my_branch

The result of each is a world model's folder, for generate.py. Clips are whole frames, as training/chunks.py reads them.
"""

if __name__ == "__main__":
    from mirage_min.data import desk

    desk.open_up()  # before the imports that take seconds

import argparse
import math
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Generator, Tensor, nn

from mirage_min.data import desk
from mirage_min.method import flow, lora
from mirage_min.method.latent_memory import Memory
from mirage_min.networks import checked, small_base
from mirage_min.systems.prompt import choose_prompt
from mirage_min.systems.world import Geometry, World, WorldSettings, pad
from mirage_min.systems.world_folder import new_branch, read_vae
from mirage_min.training import checkpoint, processes, run, watch
from mirage_min.training.chunks import Chunk, Chunks

STAGES = "base", "branch", "lora"
ADAPTER = "memory"  # the name of the LoRA
SELF_ATTENTION = [f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
WIDER = [name.replace("attn1", "attn2") for name in SELF_ATTENTION] + ["ffn.net.0.proj", "ffn.net.2"]
HELD_OUT = 32  # chunks that are scored
WAN = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@dataclass
class Recipe(run.Optimisation):
    """The defaults are the paper's for stage 1; [?] marks a guess, where the paper's value is not published."""

    steps: int = 10_000         # [?]
    batch: int = 64             # [?]
    lr: float = 1e-4            # [?]
    accumulate: int = run.may_change(1)
    latents: Annotated[int, checked.Within(2, 1000)] = 9            # of a chunk, 33 frames
    every_layer: Annotated[int, checked.Within(1, 1000)] = 4        # [?] one hint for this many layers
    memory: Literal["past", "first"] = "past"  # [?] what it holds: the clip up to the chunk, or the chunk's first frame
    mask: bool = True           # whether the branch is told where the memory shows something; the release's is not
    without: Annotated[float, checked.Within(0, 1)] = 0.0           # share of chunks that are shown an empty memory
    shift: float = 5.0
    rank: Annotated[int, checked.Within(1, 4096)] = 64
    alpha: float = 64.0         # [?]
    wide_lora: bool = False     # on attention to the text and feed-forward layers too, as in the release
    freeze_branch: bool = False  # in stage lora, as in the release
    checkpoint_dit: bool = run.may_change(False)
    half: bool = run.may_change(False)  # the result is written as float16
    seed: int = 4


RELEASE = dict(batch=4, lr=1e-5, every_layer=2, memory="first", rank=32, alpha=32.0)
# DEVIATION: a transformer that knows nothing first learns to continue clips without a memory.
SMALL = dict(batch=8, lr=1e-3, beta2=0.99, warmup=50, cosine=True, latents=3, every_layer=2, without=0.1, half=True)
RECIPES = {
    "paper": {"branch": Recipe(), "lora": Recipe(steps=20_000, lr=5e-5)},  # [?] both of stage lora
    "release": {"branch": Recipe(**RELEASE), "lora": Recipe(**RELEASE, wide_lora=True, freeze_branch=True)},
    "small": {"base": Recipe(**SMALL, steps=1_500), "branch": Recipe(**SMALL, steps=1_200),
              "lora": Recipe(**SMALL | dict(lr=5e-4), steps=900)},
}


def build(args, recipe: Recipe) -> tuple[World, dict[str, nn.Parameter]]:
    """The world model, and what is trained of it by name."""
    torch.manual_seed(recipe.seed)
    settings = dict(latents=recipe.latents, shift=recipe.shift, mask=recipe.mask)
    text = choose_prompt(args.prompt, args.base)
    if args.base is None:
        vae = read_vae(args.vae, dtype=torch.float32)
        dit = small_base.new_transformer("wan", channels=vae.config.z_dim)
        text = torch.zeros(1, 1, dit.config.text_dim) if text is None else text
        world = World(vae, dit, new_branch(dit, recipe.every_layer), text, WorldSettings(**settings))
    else:
        branch = args.base if (Path(args.base) / "branch").is_dir() else recipe.every_layer
        if args.part == "lora" and recipe.freeze_branch and branch != args.base:
            raise ValueError(f"{args.base}: has no branch, and a new one that stays frozen shows nothing: wanted the "
                             "result of the part branch, or --set freeze_branch=no")
        world = World.from_base(args.base, branch, args.vae, text, dtype=torch.float32, **settings)
    world.requires_grad_(False).eval()
    world.dit.activation_checkpointing = world.branch.activation_checkpointing = recipe.checkpoint_dit
    return world, choose(world, args.part, recipe)


def choose(world: World, part: str, recipe: Recipe) -> dict[str, nn.Parameter]:
    """What a part trains, by name; for `lora` the transformer gets its adapters here."""
    trained = {}
    if part == "base":
        trained |= {f"transformer.{name}": p for name, p in world.dit.named_parameters()}
    if part == "branch" or part == "lora" and not recipe.freeze_branch:
        trained |= {f"branch.{name}": p for name, p in world.branch.named_parameters()}
    if part == "lora":
        lora.add(world.dit, ADAPTER, recipe.rank, recipe.alpha, SELF_ATTENTION + WIDER * recipe.wide_lora)
        trained |= {f"lora.{name}.{m}": p for name, _, adapter in lora.adapters(world.dit, ADAPTER)
                    for m, p in adapter.named_parameters()}
    for p in trained.values():
        p.requires_grad_()
    return trained


def control_of(world: World, chunk: Chunk, recipe: Recipe, empty: bool = False) -> Tensor:
    """What the memory shows at the chunk's cameras, and where: [1, C + 1, F, h, w].

    The memory holds the clip's latents from its first to the chunk's first, as it does when a video is made; or the
    chunk's first alone, encoded as an image; or, `empty`, nothing.
    """
    C, F, *_ = chunk.z.shape[1:]
    first = chunk.number * (F - 1)
    memory = Memory.empty(C)
    if not empty:
        if recipe.memory == "past":
            here = slice(0, first + 1)
            latents = [chunk.latent(i) for i in range(first + 1)]
        else:
            here = slice(first, first + 1)
            latents = [chunk.z[chunk.number, :, 0]]
        known = Geometry(chunk.depth[here], None if chunk.dynamic is None else chunk.dynamic[here])
        memory = world.remember(memory, torch.stack(latents, dim=1), known, chunk.cameras[here])
    return world.shown(memory, chunk.cameras[first : first + F], chunk.z)


def forward_and_backward(world: World, part: str, recipe: Recipe, z: Tensor, control: Tensor | None,
                         terms: dict[str, Tensor], draws: list[Generator]) -> None:
    """Forward and backward for some of a step's chunks z [n, C, F, h, w], with a generator in `draws` for each.

    Their share of the batch's gradient is added to .grad, and their share of the loss to `terms`.
    """
    with run.autocast(recipe, z.device):
        loss = loss_of(world, part, recipe, z, control, draws)
    share = len(z) / recipe.batch
    (share * loss).backward()
    terms["v"] += share * loss.detach()


def loss_of(world: World, part: str, recipe: Recipe, z: Tensor, control: Tensor | None, draws: list[Generator]
            ) -> Tensor:
    """The flow's error on chunks z [n, C, F, h, w], the first latent given; control [n, C + 1, F, h, w]."""
    text = world.text.expand(len(z), -1, -1)

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        hints = None if part == "base" else world.branch(world.dit, z_t, t, text, control)
        return world.dit(z_t, t, text, hints)

    # L = mean (v − (ε − z))², over the latents 1 to F − 1
    return flow.flow_loss(predict, z, draws, recipe.shift, clean=1)


def draw(data: Chunks, world: World, part: str, recipe: Recipe, step: int, clips: range, device: str
         ) -> tuple[Tensor, Tensor | None, list[Generator], list[str]]:
    """These clips of a step's batch: z [n, C, F, h, w], their control, the generators for their noise, their names."""
    draws = [run.draws(recipe.seed, step, k) for k in clips]
    chunks = [data.draw(generator) for generator in draws]
    z = torch.stack([chunk.z[chunk.number] for chunk in chunks]).to(device)
    names = [chunk.name for chunk in chunks]
    if part == "base":
        return z, None, draws, names
    empty = [bool(torch.rand((), generator=generator) < recipe.without) for generator in draws]
    control = torch.cat([control_of(world, chunk, recipe, e) for chunk, e in zip(chunks, empty)])
    return z, control.to(device), draws, names


def main(args, recipe: Recipe) -> None:
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # autocast, in the norms
    world, params = build(args, recipe)
    world.to(args.device)

    def encode(x: Tensor) -> Tensor:
        with run.autocast(recipe, args.device):
            return world.vae.encode(pad(x.to(args.device))).float().cpu()

    def open_chunks(folder: Path) -> Chunks:
        cache = args.latents / f"{folder.resolve().name}_{recipe.latents}"
        chunks = Chunks(folder, encode, world.vae, recipe.latents, cache, geometry=args.part != "base")
        for clip in chunks.left_out:
            processes.print_once("left out:", clip)
        return chunks

    data, val = open_chunks(args.data), open_chunks(args.val) if args.val else None
    identity = checkpoint.identify(args, recipe, data.paths(), world, params)
    processes.print_once(f"world model, {args.part}: {recipe}\ntrained: {run.count(params)}")
    optimizer = run.optimizer(params, recipe)
    start = checkpoint.resume(args.run, params, optimizer, identity, recipe.steps)
    log = watch.Log(args.run, recipe, start)

    bar = run.Steps(args, recipe, start)
    for step in bar:
        terms, names = defaultdict(float), []
        optimizer.zero_grad()
        for clips in processes.pieces(recipe):
            z, control, draws, drawn = draw(data, world, args.part, recipe, step, clips, args.device)
            forward_and_backward(world, args.part, recipe, z, control, terms, draws)
            names += drawn
        processes.reduce(params, terms)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        processes.check_finite(step, terms, norm, names)
        run.set_rate(optimizer, recipe, step)
        optimizer.step()

        if step % 10 == 0:
            bar.set_postfix(log(step, terms))
        if run.due(step, recipe):
            if val is not None:
                processes.print_once(log(step, {"val_v": score(world, args, recipe, val)}))
            if processes.rank() == 0:
                watch.draw_curves(args.run / "losses.png", log.lines)
            checkpoint.save(args.run, step + 1, params, optimizer, identity)
    if processes.rank() == 0:
        if args.part == "lora":
            lora.merge(world.dit, ADAPTER)
        vae = None if args.vae is None else run.seen_from(args.out, args.vae)
        (world.half() if recipe.half else world).save_pretrained(args.out, vae, run.about(recipe))
        desk.say(f"world model, {args.part}: {recipe.steps} steps -> {args.out}")


@torch.no_grad()
def score(world: World, args, recipe: Recipe, val: Chunks) -> float:
    """The loss on some chunks of the held-out clips, the same at every call."""
    losses = []
    for k in range(HELD_OUT):
        z, control, draws, _ = draw(val, world, args.part, recipe, 0, range(k, k + 1), args.device)
        with run.autocast(recipe, args.device):
            losses.append(loss_of(world, args.part, recipe, z, control, draws).item())
    return math.fsum(losses) / len(losses)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=desk.first_line(__doc__))
    parser.add_argument("part", choices=STAGES, help="what is trained, in this order")
    parser.add_argument("--data", type=Path, default=Path("data/world"), help="folder of clips (default data/world)")
    parser.add_argument("--val", type=Path, help="folder of held-out clips, whose loss is logged")
    parser.add_argument("--base", help="folder or hub id of a Wan, or the folder of a world model to train on "
                        f"(default: a small new transformer; of the other recipes {WAN})")
    parser.add_argument("--vae", help="folder or hub id of the VAE, if not that of --base")
    parser.add_argument("--prompt", type=Path, help="the prompt's embedding (encode_prompt.py; default: that of "
                        "--base, else zeros)")
    parser.add_argument("--latents", type=Path, default=Path("runs/world_latents"),
                        help="folder for encoded clips (default runs/world_latents)")
    parser.add_argument("--out", type=Path, help="where the trained weights go (default: the run's folder)")
    parser.add_argument("--run-folder", type=Path, dest="run", metavar="FOLDER",
                        help="checkpoints and logs (default runs/world_PART_RECIPE)")
    parser.add_argument("--recipe", choices=list(RECIPES), default="small", help="settings (default small)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change a value of the recipe (a wrong key names them all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    args.run = args.run or Path("runs") / f"world_{args.part}_{args.recipe}"
    if args.recipe != "small":
        args.base = args.base or WAN
    if args.part not in RECIPES[args.recipe]:
        parser.error(f"the recipe {args.recipe} has the parts {', '.join(RECIPES[args.recipe])}: it starts from a "
                     "trained transformer")
    if args.base is None and args.vae is None:
        parser.error("wanted --vae, the VAE's folder or hub id, or a --base that has one")
    return args


if __name__ == "__main__":
    args = parse()
    run.launch(main, args, {args.recipe: RECIPES[args.recipe][args.part]})
