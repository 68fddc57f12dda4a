"""Lets diffusers and lpips import beside a CPU-only torch, where torchvision cannot load its compiled operators.

torchvision registers meta kernels for operators its missing binary would have defined; defining their names first
(any schema does) is enough to import it. Nothing here computes anything: no test may call these operators.
"""

import torch

_NAMES = ["nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"]
_library = None  # the definitions live as long as this object


def stub() -> None:
    """Define the operator names once; does nothing where torchvision's own operators are already there."""
    global _library
    if _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in _NAMES:
        for suffix in ("", "_backward", "_forward"):
            if not hasattr(torch.ops.torchvision, f"_{name}{suffix}" if suffix else name):
                _library.define(f"{'_' if suffix else ''}{name}{suffix}(Tensor x) -> Tensor")
