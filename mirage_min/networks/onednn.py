"""A 3D convolution of one small clip on a CPU, several times faster than PyTorch chooses to be: the same numbers.

On a CPU PyTorch has two convolutions, its own and oneDNN's. In float32 it takes its own for one clip of at most SMALL
numbers a column, which is what a small VAE sees all day, and there oneDNN's is two to twenty times faster, forward and
backward (PyTorch 2.13, AVX-512). It always takes oneDNN's for tensors in oneDNN's layout, so such a clip is put into it
on the way in and taken out of it on the way out. For backward the clip is kept as it came.

    python -m mirage_min.networks.onednn         # both on one clip: how far apart, and how fast
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as nnf

SMALL = 20480  # C * T * H


def is_neglected(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch would not take oneDNN's convolution for x [B, C, T, H, W], though it is the faster one."""
    onednn = torch.backends.mkldnn
    there = onednn.is_available() and onednn.enabled
    single = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    small = len(x) == 1 and x.shape[:4].numel() <= SMALL and weight.shape[-1] > 1
    real = type(x) is Tensor  # a fake one has a size and no numbers
    return there and single and small and real


class Conv3d(torch.autograd.Function):
    """conv3d of a clip [1, C, T, H, W] with a weight [C', C, kt, kh, kw] and a bias [C'] or None."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple) -> Tensor:
        """-> [1, C', T', H', W']"""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nnf.conv3d(x.to_mkldnn(), weight, bias, stride, padding).to_dense()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dy -> dL/dx, dL/dweight and dL/dbias, those that are asked for."""
        x, weight = ctx.saved_tensors
        dilation, transposed, output_padding, groups = (1, 1, 1), False, (0, 0, 0), 1
        grads = torch.ops.aten.convolution_backward(
            grad.contiguous().to_mkldnn(), x.to_mkldnn(), weight, [len(weight)], ctx.stride, ctx.padding, dilation,
            transposed, output_padding, groups, ctx.needs_input_grad[:3])
        return *(g if g is None else g.to_dense() for g in grads), None, None


if __name__ == "__main__":
    import time

    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 32, 6, 96, 144), torch.randn(32, 32, 3, 3, 3), torch.randn(32)
    results = []
    for conv in (nnf.conv3d, Conv3d.apply):
        conv(x, weight, bias, (1, 1, 1), (0, 1, 1))
        start = time.perf_counter()
        results.append(conv(x, weight, bias, (1, 1, 1), (0, 1, 1)))
        print(f"{1e3 * (time.perf_counter() - start):.0f} ms")
    print(f"they differ by {(results[0] - results[1]).abs().max() / results[0].abs().max():.1e} of the largest number")
