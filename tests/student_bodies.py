"""What students write instead: {function: [(text of the body, what is there in its place)]}, and bodies for all."""

MISTAKES = {
    "CausalConv3d.with_past": [
        ("past = self.kernel_size[0] - 1", "past = self.kernel_size[0]"),           # cache off by one
        ("x[:, :, -past:].clone()", "x[:, :, :past].clone()"),                     # the first frames kept, not the last
        ("x[:, :, -past:].clone()", "x[:, :, -past:]"),                             # the whole group stays alive
        ("[*before, x]", "[x, *before]"),                                           # padded on the right
        ("dim=2)", "dim=3)"),                                                       # axes swapped
        ("if old:", "if False:"),                                                   # the past forgotten
        ('self.first == "repeat"', 'self.first == "zeros"'),
    ],
    "name_caches": [
        ("layer.key = name", 'layer.key = name.split(".")[-1]'),
        ("module.named_modules()", "module.named_children()"),
        ("layer.key = name", "layer.key = type(layer).__name__"),
    ],
    "LoRA.delta": [
        ("self.scale *", ""),                                                       # alpha / r forgotten
        ("self.scale *", "self.alpha *"),                                           # r forgotten
        ("self.scale *", "self.A.shape[0] / self.alpha *"),                         # upside down
        ("self.B.flatten(1) @ self.A.flatten(1)", "(self.B.flatten(1) @ self.A.flatten(1)).flip(1)"),
    ],
    "AdaptedLinear.forward": [
        ("lora.scale *", ""),
        ("y = y + lora.scale", "y = lora.scale"),                                   # W x forgotten
        ("self.lora.values()", "list(self.lora.values())[:1]"),                     # one adapter alone
    ],
    "adapted_kernel": [
        ("layer.weight + sum", "layer.weight - sum"),
        ("layer.weight + sum", "sum"),                                              # W forgotten
        ("layer.lora.values()", "list(layer.lora.values())[:1]"),
    ],
    "merge": [
        ("+= lora.delta()", "-= lora.delta()"),
        ("+= lora.delta()", "= lora.delta()"),
        ("layer.__class__ = PLAIN[type(layer)]", "pass"),
    ],
    "CrossModalFusionBlock.forward": [
        ("h + s_h * rearrange", "s_h * rearrange"),                                 # the residual forgotten
        ("h + s_h * rearrange", "h + rearrange"),                                   # the scale forgotten
        ('"b c t h w -> (b t) c h w")', '"b c t h w -> (t b) c h w")'),             # axes swapped
        ("[h / s_h, f.to(h.dtype) / s_f]", "[f.to(h.dtype) / s_f, h / s_h]"),
        ("f.to(h.dtype) / s_f]", "f.to(h.dtype) / s_h]"),
    ],
    "measure_scales": [
        ("std_h.std()", "std_h.std() ** 2"),
        ("std_f.std()", "std_f.mean"),
        ("h, f = args", "f, h = args"),
        ("= measured[block]", "= measured[block] = RunningStd(), RunningStd()"),        # the last group alone
    ],
    "alpha_bar": [
        ("torch.cumprod(1 - betas, dim=0)", "1 - betas"),
        ("STEPS, dtype=torch.float64) ** 2", "STEPS, dtype=torch.float64)"),        # betas not squared
        ("* root[0] / (root[0] - root[-1])", ""),                                   # moved, not stretched
        ("(root - root[-1])", "root"),
    ],
    "add_noise": [
        ("a * z0 + b * eps", "b * z0 + a * eps"),
        ("a * z0 + b * eps", "a * z0 - b * eps"),
        ("a, b = _weights(alpha_bar_t, z0)", "a, b = _weights(alpha_bar_t ** 2, z0)"),
    ],
    "v_target": [
        ("a * eps - b * z0", "b * eps - a * z0"),
        ("a * eps - b * z0", "a * eps + b * z0"),
        ("a * eps - b * z0", "eps - z0"),                                           # a flow's
    ],
    "z0_from_v": [
        ("a * z_t - b * v", "b * z_t - a * v"),
        ("a * z_t - b * v", "a * z_t + b * v"),
        ("a * z_t - b * v", "(z_t - b * v) / a"),                                   # a network that predicts ε
        ("a * z_t - b * v", "a.to(z_t.dtype) * z_t - b.to(z_t.dtype) * v"),         # bfloat16 weights
    ],
    "z0_from_epsilon": [
        ("(z_t - b * eps) / a", "z_t - b * eps"),                                       # not divided
        ("(z_t - b * eps) / a", "(z_t + b * eps) / a"),
        ("(z_t - b * eps) / a", "a * z_t - b * eps"),                                   # a network that predicts v
        ("(z_t - b * eps) / a", "(z_t - b.to(z_t.dtype) * eps) / a.to(z_t.dtype)"),     # bfloat16 weights
    ],
    "z0_from_flow": [
        ("z_t - _column(sigma, z_t) * v", "z_t + _column(sigma, z_t) * v"),
        ("z_t - _column(sigma, z_t) * v", "z_t - (1 - _column(sigma, z_t)) * v"),
        ("z_t - _column(sigma, z_t) * v", "z_t - sigma.mean() * v"),
    ],
    "denoise": [
        ("z0_from_flow(z_t, prediction, 1.0)", "prediction"),
        ("z0_from_flow(z_t, prediction, 1.0)", "z0_from_flow(z_t, prediction, 0.2)"),
        ("dit(z_t, t, text)", "dit(add_noise(z_t, torch.randn_like(z_t), 0.74), t, text)"),
        ("alpha_bar[torch.as_tensor(t, device=alpha_bar.device)]", "alpha_bar[0]"),
    ],
    "denoise_edm": [
        ("sigma / (1 + sigma)", "sigma"),
        ("((1 - _column(t, z)) * z)", "z"),                                             # the input not shrunk
        ("z0_from_flow(z_t,", "z0_from_flow(z,"),
        ("dit(z_t, t, text)", "dit(z_t, 1000 * t, text)"),
    ],
    "algorithm_1": [
        ("c.detach().requires_grad_(c.requires_grad)", "c.detach()"),                   # never reaches back
        ("c.detach().requires_grad_(c.requires_grad)", "c"),                            # never cut
        ("min(d_trunc, i - 1) + 1", "min(d_trunc, i - 1)"),                             # one group too few
        ("min(d_trunc, i - 1) + 1", "min(d_trunc + 1, i - 1) + 1"),                     # one too many
        ("take_gradients(entered[i - k + 1])", "take_gradients(entered[i - k])"),
        ("take_gradients(entered[i - k + 1])",                                          # pushed again by later losses
         "{key: c.grad for key, c in entered[i - k + 1].items() if c.grad is not None}"),
        ("left[i - k][key]", "left[i - k + 1][key]"),
        ("loss_i.backward(retain_graph=True)", "loss_i.backward()"),
        ("if i > d_trunc:", "if False:"),                                               # graphs are never released
        ("t += x_i.shape[2]", "t += 4"),                                                # the first group has one frame
        ("[z_i.grad for z_i in latents]", "[z_i for z_i in latents]"),
    ],
    "backpropagate_tile": [
        ("c.detach().requires_grad_(c.requires_grad and d_trunc > 0)", "c.detach()"),   # never reaches back
        ("c.detach().requires_grad_(c.requires_grad and d_trunc > 0)", "c"),            # never cut
        ("window[-1].x.detach()", "window[0].x.detach()"),
        ("reach = d_trunc if", "reach = max(d_trunc - 1, 0) if"),                       # one group too early
        ("reach = d_trunc if", "reach = d_trunc + 1 if"),                               # one group too late
        ("t += x.shape[2]", "t += 4"),                                                  # the first group has one frame
        ("or not delayed", ""),
    ],
    "push_back": [
        ("take_gradients(graph.cache_in)", "{key: c.grad for key, c in graph.cache_in.items() if c.grad is not None}"),
        ("enumerate(reversed(window))", "enumerate(window)"),                           # oldest first
        ("retain_graph=k < reach", "retain_graph=k + 1 < reach"),
        ("graph.x = graph.grad_x = None", "pass"),
        ("roots = [(graph.cache_out[key], grad) for key, grad in grad_cache.items()]", "roots = []"),
    ],
    "take_leaf": [
        (".add_(leaf.grad)", ".copy_(leaf.grad)"),
        ("leaf.grad = None", "pass"),
        ("[:, :, time], tile, s)", "[:, :, time], tile, 1)"),
        ("whole[:, :, time]", "whole[:, time]"),                                        # axes swapped
    ],
    "cut_side": [
        ("n * k // pieces", "k * (n // pieces)"),                                       # the remainder lost
        ("range(pieces + 1)", "range(pieces)"),
        ("max(a - margin, 0)", "a"),
    ],
    "without_margin": [
        ("origin=side.seen.start", "origin=0"),
        ("slice(t, t + x.shape[2])", "slice(0, x.shape[2])"),
        ("*(scale(side.own, s) for side in tile)", "*(scale(side.seen, s) for side in tile)"),
    ],
    "gram": [
        ("f @ f.transpose(1, 2)", "f @ f.transpose(1, 2) / f.shape[2]"),                # mean for sum
        ("f @ f.transpose(1, 2)", "f.transpose(1, 2) @ f"),
        ('"n d h w -> n d (h w)")', '"n d h w -> n d (h w)") - f.mean()'),
    ],
    "gram_loss": [
        (".mean(dim=(1, 2))", ".sum(dim=(1, 2))"),                                      # sum for mean
        ("/ (d * h * w)", "/ (h * w)"),
        ("weight * ", ""),
        (".mean(dim=(1, 2))", ".mean()"),                                               # samples mixed
        (".square()", ".abs()"),
    ],
    "psnr": [
        ("4 / mse", "1 / mse"),                                                         # the range of [0, 1]
        ("torch.log10", "torch.log"),
        ("/ weights.sum(dim=(1, 3, 4))", "/ x[0, :, 0].numel()"),                       # the mask forgotten
        (".sum(dim=(1, 3, 4)) / weights.sum(dim=(1, 3, 4))", ".sum(dim=(1, 2, 3, 4), keepdim=True)[:, :, 0, 0, 0]"
                                                             " / weights.sum(dim=(1, 2, 3, 4))[:, None]"),
        ("> 0", ">= 0"),
    ],
    "warp": [
        ("align_corners=False", "align_corners=True"),
        ("flow[:, 0].double()", "flow[:, 1].double()"),                                 # axes swapped
        ("u <= W - 1", "u < W - 1"),
        ("(2 * u + 1) / W - 1", "2 * u / W - 1"),
    ],
    "visible_by_consistency": [
        ("w + back", "w - back"),
        ("warp(w_back, w)", "(w_back.double(), torch.ones_like(w[:, :1]) > 0)"),        # not fetched along the flow
        ("inside & ", ""),
    ],
    "warp_error": [
        ("x[:, :, t + 1], flow", "x[:, :, t], flow"),
        ("/ 2).square()", ").square()"),                                                # on [-1, 1]
        ("C * counts[-1]", "counts[-1]"),                                               # channels
        ("C * counts[-1]", "C * H * W"),                                                # over all pixels
        ("> 0", ">= 0"),                                                                # pairs without any counted
        ("1e3 * ", ""),
    ],
    "frechet": [
        ("- 2 * cross", "- cross"),
        (".clamp_min(0).sqrt().sum()", ".clamp_min(0).sum()"),                          # the root forgotten
        ("(mu1 - mu2).square().sum()", "(mu1 - mu2).norm()"),
        ("root @ cov2 @ root", "root @ cov2"),
        ("+ cov2.trace()", ""),
    ],
    "long_axis": [
        ("2 * (w * p * q).sum()", "(w * p * q).sum()"),
        ("p * p - q * q", "q * q - p * p"),                                             # the short axis
        (".item() / 2", ".item()"),
        ("w * (p * p", "(p * p"),                                                       # a weight forgotten
    ],
    "surface_normals": [
        ("directions[:, :, 0]", "directions[:, 0]"),                                    # a row for a column
        ("directions[:, :, 0]", "directions[:, :, 2]"),
        ("topk(12, largest=False)", "topk(12)"),
        ("- around.mean(1, keepdim=True)", "- x[:, None]"),
        ("1 - spread[:, 0] / spread[:, 1]", "spread[:, 0] / spread[:, 1]"),
    ],
    "step_onto_planes": [
        ("n[:, 1] * a - n[:, 0] * b", "n[:, 0] * b - n[:, 1] * a"),                     # turned the other way
        ("w[:, None] * J", "J"),
        ("(w * r)", "r"),
        ("(n * x).sum(1)", "x.norm(dim=1)"),
    ],
    "refine": [
        ("normals[nearest] @ R.T", "normals[nearest] @ R"),
        ("flat[nearest] * w.sqrt() / (1 + (gap / (2 * gap.median() + 1e-9)).square())", "flat[nearest] * w.sqrt()"),
        ("Q @ R\n", "R @ Q.T\n"),
        ("Q @ (t - c) + c + tau", "Q @ t + tau"),                                       # turned about the origin
        ("s * (1 + sigma)", "s + sigma"),
        ("dst - x)).sum(1)", "x - dst)).sum(1)"),
    ],
    "fine_2d": [
        ("size_gt / size", "size / size_gt"),
        ("c_gt - c)", "c - c_gt)"),
        (".mean(0)", ".sum(0)"),                                                        # sum for mean
    ],
    "nearest": [
        ("u >= 0", "u > 1"),                                                            # a column lost
        ("(v < h)", "(v < h + 1)"),                                                     # into the cell for the unseen
        ("z > NEAR", "z > -NEAR * 1e9"),                                                # what is not ahead is seen
        ("v.floor() * w + u.floor()", "u.floor() * h + v.floor()"),                     # columns before rows
        ('cell, z, "amin"', 'cell, -z, "amin"'),                                        # the farthest
        ("z == depth[cell], index, N", "z == depth[cell], N - 1 - index, N"),           # the newest
        ("return first[:nowhere], depth[:nowhere]", "return first[:nowhere].clamp(max=N - 1), depth[:nowhere]"),
    ],
    "cell_depth": [
        ("2 * known.sum(dim=-1) >=", "2 * known.sum(dim=-1) >"),                        # half is not enough
        ("nanmedian(dim=-1).values", "nanmean(dim=-1)"),                                # on neither surface
        ("(pixels > 0) & pixels.isfinite()", "pixels.isfinite()"),                      # 0 is no depth
        ("median, 0)", "median, 1)"),                                                   # unknown is a metre
    ],
    "flow_loss": [
        ("sigma[:, :clean] = 0", "pass"),                                               # what is given is noisy
        ("[:, :, clean:]", ""),                                                         # and judged
        ("(v - (eps - z))", "(v - (z - eps))"),                                         # the way back
        ("1000 * sigma", "sigma"),
        ("shifted(u, shift)", "u"),
        ("(1 - each) * z + each * eps", "each * z + (1 - each) * eps"),
        ("z.split(1), draws", "z.split(1), [draws[0]] * len(z)"),                       # one generator for all
    ],
    "sample": [
        ("(after - sigma) * v", "(sigma - after) * v"),                                 # away from the data
        ("t[:, :n] = 0", "pass"),
        ("1000 * sigma, dtype", "sigma, dtype"),
        ("torch.linspace(1, 0, steps + 1,", "torch.linspace(1, 0, steps,"),             # a step too few
        ("shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)",
         "torch.linspace(1, 0, steps + 1, dtype=torch.float64)"),                       # not shifted
        ("noise.to(torch.promote_types(noise.dtype, torch.float32))", "noise"),         # steps lost in bfloat16
        ("rest = z[:, :, n:]", "rest = z[:, :, : z.shape[2] - n]"),
    ],
    "patch_loss": [
        ("y[:, :, rows, columns]", "y[:, :, columns, rows]"),
        ("[:, :, rows, columns]", ""),                                                  # whole frames
        ("weight * ", ""),
        ("total / len(taps_x)", "total"),
        (".mean(dim=(1, 2, 3))", ".sum(dim=(1, 2, 3))"),
        (".square()", ".abs()"),
        ("with torch.no_grad():", "if True:"),
    ],
    "random_square": [
        ("W - side + 1", "H - side + 1"),
        ("(H - high) // 2", "H - high"),
        ("low, high + 1, ()", "high, high + 1, ()"),                                    # always the largest
        ("min(1.0, min(H, W) / PATCH_HEIGHT)", "1.0"),
        ("slice(left, left + side)", "slice(top, top + side)"),
    ],
    "warp_loss": [
        ("inside & visible.bool()", "visible.bool()"),
        ("inside & visible.bool()", "inside"),
        ("warp(other, flow)", "warp(x, flow)"),
        (".sum(dim=(1, 2, 3))\n", ".mean(dim=(1, 2, 3))\n"),
        ("seen.sum(dim=(1, 2, 3)).clamp_min(1)", "seen.sum(dim=(1, 2, 3))"),            # 0 / 0
        ("seen.sum(dim=(1, 2, 3)).clamp_min(1)", "seen[0].numel()"),                    # over all pixels
    ],
    "blur": [
        ("y * math.cos(angle) - x * math.sin(angle)", "y * math.cos(angle) + x * math.sin(angle)"),
        ("-0.5 * (along", "-1.0 * (along"),
        ("kernel / kernel.sum()", "kernel"),                                            # brighter
        ('mode="replicate"', 'mode="constant"'),                                        # dark edges
        ("/ b\n", "/ a\n"),                                                             # round
        ("3 * max(a, b)", "max(a, b)"),                                                 # cut off
    ],
}

# Bodies that solve nothing: {what: from the names of the arguments, self last, to a body}
EMPTY = {
    "nothing": lambda names: "pass",
    "a number": lambda names: "return 0",
    "zeros": lambda names: f"return {names[0]} * 0",
    "no numbers": lambda names: f"return {names[0]} * float('nan')",
    "its argument": lambda names: f"return {names[0]}",
    "spoiled inputs": lambda names: SPOIL.format(names=", ".join(names)),
}
SPOIL = """
import torch
spoiled = [{names}]
for thing in spoiled:
    if isinstance(thing, torch.Tensor):
        thing.detach().zero_()
    for parameter in thing.parameters() if isinstance(thing, torch.nn.Module) else []:
        parameter.detach().zero_()
    if isinstance(thing, (dict, list)):
        spoiled += list(thing.values()) if isinstance(thing, dict) else thing
return spoiled[0].clone() if isinstance(spoiled[0], torch.Tensor) else spoiled[0]
"""
