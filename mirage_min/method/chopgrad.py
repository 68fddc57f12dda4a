"""ChopGrad: pixel losses through a causal video decoder in memory that does not grow with the clip (Alg. 1, App. D).

A cached decoder is a recurrence over groups of frames: x_i, z^c_i = D(z^c_{i-1}, z_i). Full backpropagation keeps every
group's activations. ChopGrad lets the loss of group i reach back d_trunc groups, through the caches and nothing else:

    grad z_j = sum over j <= i <= j + d_trunc of dL_i/dz_j       and the same for parameters and injected features

    loss, grad_z = chopgrad.backward(vae, z, lambda x, where: (x - x_gt[where]).square().sum() / x_gt.numel())
    z.backward(grad_z)                                           # once through the backbone, whose graph is behind z

`vae` has decode_groups(F) -> slices, decode_group(z_g, cache, inject) -> (x_g, cache), cache a flat dict of tensors,
new at every call, and for `inject` encode_groups(T) -> slices. Never wrap it in DDP: gradients go wrong silently there.

N groups cost (N - d/2)(d + 1) passes, one for every graph that a loss reaches. `delayed` pushes the first d + 1 losses
in one sweep: (N - d)(d + 1) passes, the same gradients, and full backpropagation's cost at d = N - 1 (App. D; evicting
every s groups is left out, losses would reach unequally far). No VAE tiles exactly: experiments/chopgrad_locality.py.

    python -m mirage_min.method.chopgrad           # how far from full backpropagation, by truncation distance
"""

from collections import deque
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

Tile = tuple[tuple[slice, slice], ...]  # rows, then columns: (latent cells to decode, those of them that take loss)


@torch.enable_grad()
def backward(vae, z: Tensor, loss_fn, d_trunc: int | None = 1, tiles=(1, 1), margin=0, delayed=False, checkpoint=False,
             inject: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Pixel loss of normalised latents z [B, C, F, h, w] -> (loss, grad_z like z); parameters' gradients go to .grad.
    loss_fn     (x_g [B, 3, T', H', W'], where) -> scalar; x_g is a piece of the video without its margin and `where`
                the slices that cut its like from a [B, 3, T, H, W] target. The losses add up: weight each by its share.
    d_trunc     groups that a loss reaches back; None: all of them in one sweep, which is full backpropagation.
    tiles       (rows, columns) of latent pieces; need not divide h and w. margin: latent cells of context around each.
    checkpoint  keep only what goes into a group, and decode it again for every pass through its graph.
    inject      features of the whole clip, finest first, [B, C_i, T, H_i, W_i]; those that require grad get .grad."""
    B, C, F, h, w = z.shape
    groups, inject, losses = vae.decode_groups(F), inject or [], []
    if not (1 <= tiles[0] <= h and 1 <= tiles[1] <= w and margin >= 0 and (d_trunc is None or d_trunc >= 0)):
        raise ValueError(f"want tiles in 1..{h} x 1..{w}, margin and d_trunc >= 0, got {tiles}, {margin}, {d_trunc}")
    frames = vae.encode_groups(inject[0].shape[2]) if inject else groups
    if len(frames) != len(groups) or any(m.requires_grad and not m.is_leaf for m in inject):
        raise ValueError(f"want inject for {len(groups)} groups, leaves where it requires grad (detach it, then "
                         f"m.backward(leaf.grad)), got (shape, leaf) {[(tuple(m.shape), m.is_leaf) for m in inject]}")
    d_trunc, delayed = (len(groups) - 1, True) if d_trunc is None else (d_trunc, delayed)
    decode = (lambda *g: recompute(vae.decode_group, *g, use_reentrant=False)) if checkpoint else vae.decode_group
    for v in (z := z.detach().requires_grad_(), *inject):
        v.grad = torch.zeros_like(v) if v.requires_grad and v.grad is None else v.grad
    for tile in product(cut(h, tiles[0], margin), cut(w, tiles[1], margin)):
        losses += chop(decode, z, inject, groups, frames, tile, loss_fn, d_trunc, delayed)
    return sum(losses), z.grad


def chop(decode, z, inject, groups, frames, tile: Tile, loss_fn, d_trunc: int, delayed: bool) -> list[Tensor]:
    """Algorithm 1 on one tile -> every L_i, detached; `part` adds what flows back to the .grad of z and of inject.
    decode(z_i, cache, inject_i) takes None for no cache or no maps. A cache enters a group detached: a new leaf, which
    requires grad if it did and d_trunc > 0. The graph of L_i ends at the pixels x: loss_fn has `without_margin` of a
    leaf in their place, and dL_i/dx is the group's grad_x (None if L_i has no graph). `reach` is how many graphs the
    next loss can reach: d_trunc, or 0 after the last group. push_back(window, reach) follows every loss, or if
    `delayed` only a window of more than `reach` graphs. Then the graphs out of reach are dropped."""
    window, cache, losses, t = deque(), {}, [], 0
    for i, group in enumerate(groups):                                          # ChopGrad Alg. 1, line 1
        # z^c_{i-1} <- detach(z^c_{i-1})                                        ChopGrad Alg. 1, line 2
        cache = {key: c.detach().requires_grad_(c.requires_grad and d_trunc > 0) for key, c in cache.items()}
        # x_i, z^c_i = D(Concat(z^c_{i-1}, z_i))                                ChopGrad Alg. 1, line 3
        z_i, inject_i = part(z, group, tile, 1), [part(m, frames[i], tile, m.shape[4] // z.shape[4]) for m in inject]
        window.append(Graph(cache, *decode(z_i, cache or None, inject_i or None)))
        x = window[-1].x.detach().requires_grad_()
        loss_i = loss_fn(*without_margin(x, t, tile, x.shape[4] // z_i.shape[4]))  # ChopGrad Alg. 1, lines 4, 5
        if loss_i.requires_grad:
            window[-1].grad_x, = torch.autograd.grad(loss_i, x, allow_unused=True)
        losses, t, cache = [*losses, loss_i.detach()], t + x.shape[2], window[-1].cache_out
        reach = d_trunc if group is not groups[-1] else 0                       # graphs that the next loss can reach
        if len(window) > reach or not delayed:
            push_back(window, reach)                                            # ChopGrad Alg. 1, lines 5 to 9
        # DEVIATION: line 11 has i >= d_trunc; counted from 1 as there, the first graph to go is that of d_trunc + 1
        while len(window) > reach:                                              # ChopGrad Alg. 1, line 11
            window.popleft()                                                    # ChopGrad Alg. 1, line 12
    return losses


@dataclass
class Graph:
    """What is alive of one group: its graph hangs between the leaves of cache_in and the tensors handed out."""
    cache_in: dict[str, Tensor]    # z^c_{i-1}, detached; its .grad is what the group before receives
    x: Tensor | None               # pixels, until their gradient has been pushed back
    cache_out: dict[str, Tensor]   # z^c_i
    grad_x: Tensor | None = None   # dL_i/dx_i


def push_back(window: deque[Graph], reach: int) -> None:
    """Lines 5 to 9, newest graph first; the newest `reach` stay usable for later losses. At most one pass a graph:
    from x with grad_x, which is pushed once, and from cache_out with what the group after it left in its cache_in."""
    grad_cache = {}
    # DEVIATION: line 7 has k <= min(d_trunc, i), but the window ends at group 1, so k <= min(d_trunc, i - 1)
    for k, graph in enumerate(reversed(window)):                                # ChopGrad Alg. 1, line 7; k = 0: 5, 6
        roots = [(graph.cache_out[key], g) for key, g in grad_cache.items()]
        roots += [] if graph.grad_x is None else [(graph.x, graph.grad_x)]
        if roots:
            # grad z_{i-k} += (dz^c_{i-k} / dz_{i-k})^T grad z^c_{i-k}          ChopGrad Alg. 1, lines 5, 8
            # grad z^c_{i-k-1} = (dz^c_{i-k} / dz^c_{i-k-1})^T grad z^c_{i-k}   ChopGrad Alg. 1, lines 6, 9
            torch.autograd.backward(*zip(*roots), retain_graph=k < reach)
        graph.x = graph.grad_x = None  # pushed once; what only the pixels needed of the graph goes with them
        grad_cache = {key: c.grad for key, c in graph.cache_in.items() if c.grad is not None}
        for c in graph.cache_in.values():
            c.grad = None  # or the next loss would push this one's gradient again


def part(whole: Tensor, time: slice, tile: Tile, s: int) -> Tensor:
    """A leaf on a part of a leaf, s pixels to a cell. What gradient it gets in a pass is added to that part of
    whole.grad (which is there), if `whole` requires grad, and its own is dropped."""
    where = (slice(None), slice(None), time, *(scale(cells, s) for cells, _ in tile))
    leaf = whole[where].detach().requires_grad_(whole.requires_grad)
    def deliver(leaf):
        whole.grad[where].add_(leaf.grad)
        leaf.grad = None
    if whole.requires_grad:
        leaf.register_post_accumulate_grad_hook(deliver)
    return leaf


def cut(n: int, pieces: int, margin: int) -> list[tuple[slice, slice]]:
    """n cells in pieces that begin at n·k // pieces -> one side of a Tile for each; a margin ends where the cells do"""
    edges = [n * k // pieces for k in range(pieces + 1)]
    return [(slice(max(a - margin, 0), min(b + margin, n)), slice(a, b)) for a, b in pairwise(edges)]


def scale(cells: slice, s: int, origin: int = 0) -> slice:
    """The pixels of these latent cells, s to a cell, counted from cell `origin`."""
    return slice((cells.start - origin) * s, (cells.stop - origin) * s)


def without_margin(x: Tensor, t: int, tile: Tile, s: int) -> tuple[Tensor, tuple[slice, ...]]:
    """The pixels of a decoded tile that take loss, and where in the video they lie; x begins at frame t."""
    inside = (..., *(scale(own, s, cells.start) for cells, own in tile))
    return x[inside], (slice(None), slice(None), slice(t, t + x.shape[2]), *(scale(own, s) for _, own in tile))


if __name__ == "__main__":
    from ..networks.vae_cogvideox import CogVideoXVAE, CogVideoXVAEConfig
    torch.manual_seed(0)
    vae, z = CogVideoXVAE(CogVideoXVAEConfig(3, 3, (8, 8, 8, 8), 4, 1, norm_num_groups=4)), torch.randn(1, 4, 11, 4, 6)
    (_, full), *rest = (backward(vae, z, lambda x, where: x.square().sum(), d) for d in (None, *range(5)))
    for d, (loss, grad_z) in enumerate(rest):
        print(f"d_trunc {d}: loss {loss:.0f}, grad z {(grad_z - full).norm() / full.norm():.1%} off (random weights)")
