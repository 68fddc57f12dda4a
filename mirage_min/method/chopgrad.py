"""ChopGrad: pixel losses through a causal video decoder in memory that does not grow with the clip (Alg. 1, App. D).

A cached decoder is a recurrence over groups of frames: x_i, z^c_i = D(z^c_{i-1}, z_i). Full backpropagation keeps every
group's activations. ChopGrad lets the loss of group i reach back d_trunc groups, through the caches and nothing else:

    grad z_j = sum over j <= i <= j + d_trunc of dL_i/dz_j       and the same for parameters and injected features

`algorithm_1` is the paper's algorithm, line by line. `backward` gives the same gradients and is what training calls:

    loss, grad_z = chopgrad.backward(vae, z, lambda x, where: (x - x_gt[where]).square().sum() / x_gt.numel())
    z.backward(grad_z)                                           # once through the backbone, from which z came

It adds tiles, injected features, recomputation, and a loss whose own graph ends at the pixels. Never wrap the decoder
in DDP: its gradients would be wrong, silently.

N groups cost (N - d/2)(d + 1) passes, one for every graph that a loss reaches. `delayed` pushes the first d + 1 losses
in one sweep: (N - d)(d + 1) passes, the same gradients, and full backpropagation's cost at d = N - 1 (App. D). Left
out: App. D's eviction of graphs every s groups, by which losses would reach unequally far.

    python -m mirage_min.method.chopgrad      # truncation on a recurrence of plain numbers, then on a video decoder
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from .tiles import Tile, cut, select, without_margin

Cache = dict[str, Tensor]
Loss = Callable[[Tensor, tuple[slice, ...]], Tensor]


class CausalDecoder(Protocol):
    """What ChopGrad asks of a VAE."""

    def decode_groups(self, F: int) -> list[slice]:
        """The latents of each group of a video of F latents, in order: slices that cover 0 to F."""

    def decode_group(self, z_g: Tensor, cache: Cache | None, inject: list[Tensor] | None) -> tuple[Tensor, Cache]:
        """z_g [B, C, f, h, w] after `cache` (None: the first group) -> (its frames [B, 3, t, H, W], a new cache).

        The cache is a flat dict of tensors. inject: the group's features, finest first, or None.
        """

    def encode_groups(self, T: int) -> list[slice]:
        """The frames of each group of a video of T frames, in order; called only where features are injected."""


# ---- the algorithm ---------------------------------------------------------------------------------------------------

@torch.enable_grad()
def algorithm_1(vae: CausalDecoder, z: Tensor, loss_fn: Loss, d_trunc: int) -> tuple[Tensor, Tensor]:
    """Pixel loss of latents z [B, C, F, h, w] -> (loss, grad_z like z); parameters' gradients go to their .grad.

    Groups are decoded in order, i from 1, each from the cache that the one before it left (the first from None). That
    cache enters detached, as leaves that require grad where it did. L_i = loss_fn(x_i, where) is backpropagated into
    z_i and those leaves; `where` are the five slices that cut x_i's frames from a video [B, 3, T, H, W]. The leaves'
    gradients are pushed back through the caches that earlier groups left, d_trunc groups at most. No leaf keeps a
    gradient that a later loss would push again, and no graph is kept that no later loss can reach. loss is Σ L_i.
    """
    latents = [z[:, :, group].detach().requires_grad_() for group in vae.decode_groups(z.shape[2])]
    entered, left = {}, {}                                  # of every group i: z^c_{i-1} as leaves, and z^c_i
    cache, losses, t = {}, [], 0
    for i, z_i in enumerate(latents, start=1):                                    # ChopGrad Alg. 1, line 1
        # z^c_{i-1} <- detach(z^c_{i-1})                                          ChopGrad Alg. 1, line 2
        entered[i] = {key: c.detach().requires_grad_(c.requires_grad) for key, c in cache.items()}
        # x_i, z^c_i = D(Concat(z^c_{i-1}, z_i))                                  ChopGrad Alg. 1, line 3
        x_i, cache = vae.decode_group(z_i, entered[i] or None)
        left[i] = cache
        # L_i, of the frames of x_i                                               ChopGrad Alg. 1, line 4
        loss_i = loss_fn(x_i, (slice(None), slice(None), slice(t, t + x_i.shape[2]), slice(None), slice(None)))
        # grad z_i += dL_i / dz_i,  grad z^c_{i-1} = dL_i / dz^c_{i-1}            ChopGrad Alg. 1, lines 5, 6
        loss_i.backward(retain_graph=True)
        # DEVIATION: line 7 has k <= min(d_trunc, i), but the first group is group 1
        for k in range(1, min(d_trunc, i - 1) + 1):                               # ChopGrad Alg. 1, line 7
            # grad z_{i-k} += (dz^c_{i-k} / dz_{i-k})^T grad z^c_{i-k}            ChopGrad Alg. 1, line 8
            # grad z^c_{i-k-1} = (dz^c_{i-k} / dz^c_{i-k-1})^T grad z^c_{i-k}     ChopGrad Alg. 1, line 9
            grad_c = take_gradients(entered[i - k + 1])
            torch.autograd.backward([left[i - k][key] for key in grad_c], list(grad_c.values()), retain_graph=True)
        # DEVIATION: line 11 has i >= d_trunc, but the first graph to go is group 1's, at i = d_trunc + 1
        if i > d_trunc:                                                           # ChopGrad Alg. 1, line 11
            del entered[i - d_trunc], left[i - d_trunc]                           # ChopGrad Alg. 1, line 12
        losses.append(loss_i.detach())
        t += x_i.shape[2]
    return sum(losses), torch.cat([z_i.grad for z_i in latents], dim=2)


def take_gradients(leaves: Cache) -> Cache:
    """Take the gradients of those leaves that have one, and clear them ("cache gradients are zeroed", App. A)."""
    gradients = {key: c.grad for key, c in leaves.items() if c.grad is not None}
    for c in leaves.values():
        c.grad = None
    return gradients


# ---- the same for training -------------------------------------------------------------------------------------------

@torch.enable_grad()
def backward(vae: CausalDecoder, z: Tensor, loss_fn: Loss, d_trunc: int | None = 1, tiles: tuple[int, int] = (1, 1),
             margin: int = 0, delayed: bool = False, checkpoint: bool = False, inject: list[Tensor] | None = None
             ) -> tuple[Tensor, Tensor]:
    """Pixel loss of normalised latents z [B, C, F, h, w] -> (loss, grad_z like z); parameters' gradients go to .grad.

    loss_fn     (x_g [B, 3, T', H', W'], where) -> scalar; x_g is a piece of the video without its margin and `where`
                the slices that cut the same piece from a target [B, 3, T, H, W]. The losses add up: weight each by its
                share.
    d_trunc     groups that a loss reaches back; None: all of them in one sweep, which is full backpropagation
    tiles       (rows, columns) of latent pieces; need not divide h and w
    margin      latent cells of context around each tile
    delayed     wait with the first losses until the window is full, and push them back together (App. D)
    checkpoint  keep only what goes into a group, and decode it again for every pass through its graph
    inject      features of the whole clip, finest first, [B, C_i, T, H_i, W_i]; those that require grad get .grad
    ValueError if the tiles, the distance or the features do not fit the clip.
    """
    if d_trunc is not None and d_trunc < 0:
        raise ValueError(f"want d_trunc of 0 or more, got {d_trunc}")
    clip = Clip(vae, z, inject or [], checkpoint)
    if d_trunc is None:
        d_trunc, delayed = len(clip.groups) - 1, True
    losses = []
    for tile in cut(*z.shape[3:], tiles, margin):
        losses += backpropagate_tile(clip, tile, loss_fn, d_trunc, delayed)
    return sum(losses), clip.z.grad


class Clip:
    """A clip to be decoded group by group and tile by tile: latents and features that collect their gradients.

    ValueError if inject has other groups than z, or requires grad and is not a leaf.
    """

    def __init__(self, vae: CausalDecoder, z: Tensor, inject: list[Tensor], checkpoint: bool):
        self.vae, self.checkpoint = vae, checkpoint
        self.z, self.inject = z.detach().requires_grad_(), inject
        self.groups = vae.decode_groups(z.shape[2])                            # latents of each group
        self.frames = vae.encode_groups(inject[0].shape[2]) if inject else []  # frames of each group
        no_leaf = any(m.requires_grad and not m.is_leaf for m in inject)
        if no_leaf or (inject and len(self.frames) != len(self.groups)):
            raise ValueError(f"want inject for {len(self.groups)} groups, leaves where it requires grad (detach it, "
                             "then m.backward(leaf.grad)), got (shape, is a leaf) "
                             f"{[(list(m.shape), m.is_leaf) for m in inject]}")
        for v in (self.z, *inject):
            if v.requires_grad and v.grad is None:
                v.grad = torch.zeros_like(v)

    def decode(self, i: int, tile: Tile, cache: Cache) -> tuple[Tensor, Cache]:
        """Decode the part of group i that a tile sees, after `cache` -> (x [B, 3, T_i, H', W'], a new cache)."""
        z_i = take_leaf(self.z, self.groups[i], tile, 1)
        inject_i = [take_leaf(m, self.frames[i], tile, m.shape[4] // self.z.shape[4]) for m in self.inject]
        given = z_i, cache or None, inject_i or None
        if self.checkpoint:
            return recompute(self.vae.decode_group, *given, use_reentrant=False)
        return self.vae.decode_group(*given)


def take_leaf(whole: Tensor, time: slice, tile: Tile, s: int) -> Tensor:
    """Cut the part that a tile sees of some frames of whole [B, C, T, h·s, w·s]: a leaf [B, C, T', height·s, width·s].

    If `whole` requires grad, so does the leaf. After each backward pass its gradient is added to the same region of
    whole.grad, which must exist, and then cleared.
    """
    leaf = select(whole[:, :, time], tile, s).detach().requires_grad_(whole.requires_grad)

    def deliver(leaf: Tensor) -> None:
        select(whole.grad[:, :, time], tile, s).add_(leaf.grad)
        leaf.grad = None

    if whole.requires_grad:
        leaf.register_post_accumulate_grad_hook(deliver)
    return leaf


@dataclass
class Graph:
    """The graph of one group, from the leaves cache_in to its results x and cache_out."""

    cache_in: Cache                # z^c_{i-1}, detached: its gradients are those of the previous cache_out
    x: Tensor | None               # pixels, until their gradient has been pushed back
    cache_out: Cache               # z^c_i
    grad_x: Tensor | None = None   # dL_i/dx_i


def backpropagate_tile(clip: Clip, tile: Tile, loss_fn: Loss, d_trunc: int, delayed: bool) -> list[Tensor]:
    """Algorithm 1 on one tile of a clip, whose z and inject collect the gradients -> the losses L_i [], detached.

    Three things differ from algorithm_1. The loss has a separate graph, which ends at the pixels and is freed before
    the decoder's backward begins; dL_i/dx is kept as the group's grad_x, None if the loss has no graph. A cache enters
    as leaves that require grad only if d_trunc > 0. push_back(window, reach) follows every loss or, if `delayed`, only
    once the window has more than `reach` graphs; `reach` is how many graphs the next loss can reach: d_trunc, or 0
    after the last group. Graphs out of reach then leave the window.
    """
    window: deque[Graph] = deque()
    cache, losses, t = {}, [], 0
    for i in range(len(clip.groups)):
        cache = {key: c.detach().requires_grad_(c.requires_grad and d_trunc > 0) for key, c in cache.items()}
        window.append(Graph(cache, *clip.decode(i, tile, cache)))
        x = window[-1].x.detach().requires_grad_()
        loss_i = loss_fn(*without_margin(x, t, tile))
        if loss_i.requires_grad:
            window[-1].grad_x, = torch.autograd.grad(loss_i, x, allow_unused=True)
        losses.append(loss_i.detach())
        t += x.shape[2]
        cache = window[-1].cache_out
        reach = d_trunc if i < len(clip.groups) - 1 else 0
        if len(window) > reach or not delayed:
            push_back(window, reach)
        while len(window) > reach:
            window.popleft()
    return losses


def push_back(window: deque[Graph], reach: int) -> None:
    """Lines 5 to 9 of Algorithm 1 for a window of graphs, newest first; the newest `reach` stay usable afterwards.

    Each graph has one pass at most: from x with grad_x, which is pushed once and then dropped, and from cache_out with
    the gradients that the next group's pass left in its cache_in, whose leaves are cleared.
    """
    grad_cache = {}
    for k, graph in enumerate(reversed(window)):
        roots = [(graph.cache_out[key], grad) for key, grad in grad_cache.items()]
        if graph.grad_x is not None:
            roots.append((graph.x, graph.grad_x))
        if roots:
            tensors, gradients = zip(*roots)
            torch.autograd.backward(tensors, gradients, retain_graph=k < reach)
        graph.x = graph.grad_x = None  # pushed once; this frees the part of the graph that only the pixels needed
        grad_cache = take_gradients(graph.cache_in)


if __name__ == "__main__":
    from ..networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig

    class Numbers:
        """A decoder of plain numbers: c_i = c_{i-1} / 2 + z_i and x_i = c_i, so that dx_i / dz_j is 1 / 2^(i - j)."""

        def decode_groups(self, F):
            return [slice(i, i + 1) for i in range(F)]

        def decode_group(self, z_i, cache, inject=None):
            c_i = z_i if cache is None else cache["c"] / 2 + z_i
            return c_i, {"c": c_i}

    print("x_i = c_i = c_{i-1} / 2 + z_i, four groups, loss Σ x_i: the full gradient of z_1 is 1 + 1/2 + 1/4 + 1/8")
    for d in range(4):
        _, grad_z = algorithm_1(Numbers(), torch.ones(1, 1, 4, 1, 1), lambda x, where: x.sum(), d)
        print(f"d_trunc {d}: grad z {grad_z.flatten().tolist()}")

    torch.manual_seed(0)
    vae = CogVideoXVAE(CogVideoXVAEConfig(block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1,
                                          norm_num_groups=4))
    z = torch.randn(1, 4, 11, 2, 3)
    _, full = backward(vae, z, lambda x, where: x.square().sum(), d_trunc=None)
    for d in range(5):
        loss, grad_z = backward(vae, z, lambda x, where: x.square().sum(), d)
        print(f"d_trunc {d}: loss {loss:.0f}, grad z {(grad_z - full).norm() / full.norm():.1%} off (random weights)")
