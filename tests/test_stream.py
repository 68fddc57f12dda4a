"""Streams: any length in constant memory, windows and tiles that blend, and two streams that never meet."""

import pytest
import torch

from mirage_min.systems.stream import Windows, blend, stream_images
from tests import small


@pytest.fixture(scope="module")
def mirage():
    return small.mirage(window=3)


def clip(T, H=32, W=48, seed=0):
    return torch.rand(1, 3, T, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def streamed(mirage, x, **kwargs):
    return torch.stack(list(mirage.stream(iter(x[0].unbind(1)), **kwargs)), dim=1)[None]


@pytest.mark.parametrize("T", [1, 2, 9, 10, 17, 33])
@pytest.mark.parametrize("patch_size_t", [None, 2])
def test_a_stream_with_one_window_is_the_plain_forward(T, patch_size_t):
    mirage = small.mirage(patch_size_t)
    x = clip(T, 24, 20)
    difference = (streamed(mirage, x, window=9) - mirage(x).clamp(-1, 1)).abs().max()
    assert difference < 1e-5, f"largest difference {difference:.1e} to the plain forward, allowed 1e-5"


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_stream_of_the_change_only_is_the_forward_of_it(tiles):
    mirage, x = small.mirage(), clip(17, 40, 32)
    plain = streamed(mirage, x)
    mirage.change_only = True
    changed = streamed(mirage, x, window=9, tiles=tiles, margin=3)  # a margin as wide as the frame: tiles are exact
    difference = (changed - mirage(x).clamp(-1, 1)).abs().max()
    assert difference < 1e-5 and (changed - plain).abs().max() > 0.1, f"largest difference {difference:.1e}"


@pytest.mark.parametrize("T, H, W", [(1, 16, 16), (2, 17, 33), (8, 16, 40), (9, 31, 16), (18, 20, 16)])
def test_a_stream_of_any_length_and_size_is_as_many_clamped_frames_of_that_size(mirage, T, H, W):
    y = streamed(mirage, 3 * clip(T, H, W))
    assert y.shape == (1, 3, T, H, W) and y.abs().max() <= 1 and y.dtype == torch.float32


@pytest.mark.parametrize("patch_size_t, window, T", [
    (None, 3, 57), (None, 5, 50), (None, 4, 33), (2, 5, 57), (2, 9, 90)])
def test_a_stream_yields_every_frame_once_whatever_the_window(patch_size_t, window, T):
    mirage = small.mirage(patch_size_t)
    mirage.denoise = lambda z: z  # then windows and their blending must give back what went in
    x = clip(T, 16, 16)
    whole = mirage.vae.decode(mirage.vae.encode(mirage.pad(x)), mirage.mids(mirage.pad(x)))[:, :, :T].clamp(-1, 1)
    difference = (streamed(mirage, x, window=window) - whole).abs().max()
    assert difference < 1e-5, f"largest difference {difference:.1e} to one uninterrupted decode, allowed 1e-5"


def windows_of(length, window, patch):
    """The latents that each window of a stream sees, when latents come three, then two at a time."""
    seen = []
    z = torch.arange(float(length)).view(1, 1, length, 1, 1)
    windows = Windows(lambda z: (seen.append(z.flatten().int().tolist()), z)[1], window, patch)
    pieces = z.split([3] + [2] * ((length - 3) // 2), dim=2)
    out = torch.cat([windows.push(piece, last=piece is pieces[-1]) for piece in pieces], dim=2)
    assert torch.equal(out, z), "a window that changes nothing gives back what went in"
    return seen


@pytest.mark.parametrize("patch, window, length, wanted", [
    (1, 3, 7, [(0, 3), (2, 5), (4, 7)]),
    (1, 9, 25, [(0, 9), (7, 16), (14, 23), (21, 25)]),
    (2, 5, 13, [(0, 5), (3, 7), (5, 9), (7, 11), (9, 13)]),
    (2, 9, 25, [(0, 9), (7, 15), (13, 21), (19, 25)]),
    (2, 17, 33, [(0, 17), (13, 29), (25, 33)]),
    (1, 8, 21, [(0, 8), (6, 14), (12, 20), (18, 21)])])
def test_windows_share_a_quarter_and_fall_on_whole_temporal_patches(patch, window, length, wanted):
    """Two of nine are shared, at least one patch; where a patch is 2, only the first window, whose first latent the
    transformer doubles, is odd."""
    assert windows_of(length, window, patch) == [list(range(a, b)) for a, b in wanted]


def test_a_window_is_denoised_as_soon_as_its_last_latent_is_there():
    """Windows of 4 that share 1 begin at latents 0, 3, 6 and 9 and are full with 4, 7, 10; the last with the 12th."""
    windows = Windows(lambda z: z, 4, 1)
    final = [windows.push(torch.zeros(1, 4, 2, 4, 6), last=number == 6).shape[2] for number in range(1, 7)]
    assert final == [0, 3, 0, 3, 3, 3]


def test_blended_weights_rise_and_sum_to_one():
    tail, new = torch.zeros(1, 1, 3, 1, 1), torch.ones(1, 1, 5, 1, 1)
    assert torch.allclose(blend(tail, new).flatten(), torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0]))
    assert blend(None, new) is new


@pytest.mark.parametrize("patch, window", [(1, 3), (1, 9), (2, 5), (2, 9)])
def test_the_weights_of_all_windows_sum_to_one_at_every_latent(patch, window):
    """Window k answers with 1 in channel k and 0 elsewhere: what comes out are the weights themselves."""
    calls = []

    def denoise(z):
        calls.append(z.shape[2])
        answer = torch.zeros(1, 30, *z.shape[2:])
        answer[:, len(calls) - 1] = 1
        return answer

    windows, pieces = Windows(denoise, window, patch), torch.zeros(1, 30, 31, 1, 1).split(2, dim=2)
    weights = torch.cat([windows.push(z, last=z is pieces[-1]) for z in pieces], dim=2)[0, :, :, 0, 0]
    assert weights.shape == (30, 31) and len(calls) > 3 and (weights >= 0).all()
    assert torch.allclose(weights.sum(0), torch.ones(31), atol=1e-6), weights.sum(0)
    assert ((weights > 0).sum(0) == 2).any(), "no two windows are blended"
    assert max(calls) <= window


# ---- what a stream keeps, and what it refuses ------------------------------------------------------------------------

def images(frames):
    """A system without memory: it makes frames darker."""
    return stream_images(frames, lambda x: x - 0.5, batch=3, like=torch.zeros(()))


def kinds():
    """Each kind of stream: windows of a video, single images."""
    return {"windows": small.mirage(window=3).stream, "images": images}


KINDS = pytest.mark.parametrize("kind", ["windows", "images"])


@KINDS
def test_two_streams_of_one_system_in_turn_are_each_as_if_alone(kind):
    stream, a, b = kinds()[kind], clip(17, 32, 48, seed=1)[0].unbind(1), clip(17, 48, 20, seed=2)[0].unbind(1)
    alone = [list(stream(frames)) for frames in (a, b)]
    for t, both in enumerate(zip(stream(a), stream(b))):
        for name, y, wanted in zip("ab", both, (alone[0][t], alone[1][t])):
            assert y.shape == wanted.shape, f"frame {t} of {name}"
            assert torch.equal(y, wanted), f"frame {t} of {name}: {(y - wanted).abs().max():.1e}"


@KINDS
def test_a_stream_of_nothing_is_nothing_and_a_stream_of_many_reads_few_ahead(kind):
    stream, taken = kinds()[kind], []
    assert list(stream([])) == []

    def frames():
        for t in range(60):
            taken.append(t)
            yield torch.zeros(3, 16, 16)
    held = [len(taken) - t for t, _ in enumerate(stream(frames()))]
    assert max(held) <= 19, f"{held}: two groups and the next frame"


def test_a_mirage_streams_no_frame_that_its_forward_refuses(mirage):
    with pytest.raises(ValueError, match=r"frame 0: wanted \[3, H, W\], H and W at least 16, got \[3, 8, 8\]"):
        list(mirage.stream([torch.zeros(3, 8, 8)]))


@KINDS
@pytest.mark.parametrize("shapes, said", [
    ([(1, 16, 16)], r"frame 0: wanted .* got \[1, 16, 16\]"), ([(16, 16)], "frame 0: wanted "),
    ([(3, 16, 16)] * 12 + [(3, 16, 24)], r"frame 12: wanted \[3, 16, 16\] as the frames before it, got \[3, 16, 24\]")])
def test_frames_that_are_none_and_frames_of_another_size_are_named(kind, shapes, said):
    with pytest.raises(ValueError, match=said):
        list(kinds()[kind](torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("dtype, hint", [(torch.float32, "NaN or inf\\)$"), (torch.float16, "float16 ends at 65504")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_result_that_is_not_finite_ends_the_stream_at_its_frame(value, dtype, hint):
    def harmonise(x):
        y = x.clone()
        y[x[:, 0, 0, 0] > 0.5, 1, 3, 5] = value  # one number in a frame that is bright
        return y
    frames, done = [torch.full((3, 16, 16), 0.9 if t == 7 else 0.0) for t in range(9)], []
    with pytest.raises(ValueError, match=f"^frame 7 .*not finite.*{hint}"):
        for frame in stream_images(frames, harmonise, batch=3, like=torch.zeros((), dtype=dtype)):
            done.append(frame)
    assert len(done) == 7


def test_a_mirage_that_overflows_in_float16_ends_its_stream_with_one_line():
    mirage, frames = small.mirage(window=3), clip(3, 16, 16)[0].unbind(1)
    mirage.vae.decoder.conv_out.conv.weight.fill_(60000)
    assert len(list(mirage.stream(frames))) == 3, "float32 holds the same numbers"
    with pytest.raises(ValueError, match=r"^frame 0 .* float16 ends at 65504, take bfloat16 or float32$"):
        list(mirage.half().stream(frames))


def test_a_mirage_that_breaks_in_its_second_group_names_the_frame_of_the_video(monkeypatch):
    mirage = small.mirage(window=3)
    decode = mirage.vae.decode_group

    def broken(z, cache=None, inject=None):
        y, new = decode(z, cache, inject)
        y[:, :, 3] = float("inf") if cache else 0.0
        return y, new
    monkeypatch.setattr(mirage.vae, "decode_group", broken)
    with pytest.raises(ValueError, match="^frame 12 "):
        list(mirage.stream(clip(17, 16, 16)[0].unbind(1)))


@pytest.mark.parametrize("batch, sizes", [(1, [1] * 5), (2, [2, 2, 1]), (4, [4, 1]), (9, [5])])
def test_single_images_go_through_in_batches_and_in_order(batch, sizes):
    frames, seen = [torch.full((3, 16, 18), t / 10) for t in range(5)], []

    def harmonise(x):
        seen.append(len(x))
        assert x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        return -x
    out = list(stream_images(iter(frames), harmonise, batch, like=torch.zeros((), dtype=torch.bfloat16)))
    assert seen == sizes and all(y.dtype == torch.float32 for y in out)
    assert [y.mean().item() for y in out] == pytest.approx([-t / 10 for t in range(5)], abs=0.01)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        list(stream_images(frames, harmonise, 0, like=torch.zeros(())))


# ---- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles, margin", [(2, 0), (2, 1), (3, 2), (4, 5)])
def test_tiles_of_a_vae_that_sees_single_cells_blend_to_the_untiled_result(tiles, margin):
    """Mean of a cell one way, repetition the other, and a cache that says how many groups its own tile has had."""
    mirage = small.mirage(window=3)

    def counted(y, cache):
        age = cache["age"] + 1 if cache else torch.zeros(1, 1, 1, *y.shape[-2:], dtype=y.dtype)
        return y + age, {"age": age}

    def encode_group(x, cache=None):
        z = x.mean(1, keepdim=True).unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).mean((4, 6))
        return counted(z[:, :, :: 4].repeat(1, 4, 1, 1, 1), cache)

    def decode_group(z, cache=None, inject=None):
        x = z[:, :3, -1:].repeat_interleave(8, 3).repeat_interleave(8, 4)
        return counted(x.repeat(1, 1, 9 if not cache else 8, 1, 1) / 9 + inject[0], cache)

    mirage.vae.encode_group, mirage.vae.decode_group, mirage.mids = encode_group, decode_group, lambda x: [x]
    mirage.denoise, x = lambda z: z, clip(25, 60, 76)
    x = x / 99
    difference = (streamed(mirage, x, tiles=tiles, margin=margin) - streamed(mirage, x)).abs().max()
    assert difference < 1e-5, f"largest difference {difference:.1e} to the untiled result, allowed 1e-5"


def test_tiles_with_a_margin_as_wide_as_the_frame_are_the_untiled_result(mirage):
    x = clip(10, 40, 32)
    difference = (streamed(mirage, x, tiles=2, margin=3) - streamed(mirage, x)).abs().max()
    assert difference < 1e-5, f"largest difference {difference:.1e}, allowed 1e-5"
    assert (streamed(mirage, x, tiles=2, margin=0) - streamed(mirage, x)).abs().max() > 1e-3, "nothing was tiled"


def test_both_vaes_see_every_tile_in_rows_and_columns_with_the_margin_around_it(monkeypatch):
    mirage, seen = small.mirage(window=3), []
    for name in ("encode_group", "decode_group"):
        group = getattr(mirage.vae, name)
        monkeypatch.setattr(mirage.vae, name, lambda x, *args, group=group, **more: (
            seen.append(tuple(x.shape[-2:])), group(x, *args, **more))[1])
    list(mirage.stream([torch.zeros(3, 64, 48)], tiles=2, margin=1))
    assert seen == [(40, 32)] * 4 + [(5, 4)] * 4, "of 8 x 6 cells a tile has 4 x 3 and sees one more inwards"


@pytest.mark.parametrize("tiles, margin", [(0, 1), (3, 1), (2, -1)])
def test_tiles_that_do_not_fit_are_refused(mirage, tiles, margin):
    with pytest.raises(ValueError, match="want tiles in"):
        streamed(mirage, clip(1, 16, 16), tiles=tiles, margin=margin)


@pytest.mark.parametrize("patch_size_t, window", [(None, 2), (2, 4), (2, 8), (2, 3)])
def test_a_window_that_does_not_fit_is_refused(patch_size_t, window):
    with pytest.raises(ValueError, match="window must be"):
        streamed(small.mirage(patch_size_t), clip(9, 16, 16), window=window)


