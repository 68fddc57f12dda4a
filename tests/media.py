"""Videos for the tests, made on the spot: whatever a camera, an editor or a bad disk may do to one."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from mirage_min.data.video import Video, writing

RATE = 10  # frames a second
# Not smaller than 64 x 64, where the x265 of PyAV's wheels writes beyond its memory.
HEIGHT, WIDTH = 64, 96


def picture(t: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frame t as uint8 [H, W, 3]: smooth, with nothing that compression could lose, and brighter by 6 each time."""
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    ramp = np.stack([40 * x + 0 * y, 40 * y + 0 * x, 40 - 20 * (x + y)], axis=-1)
    return (ramp + 5 + 6 * t % 205).round().astype(np.uint8)


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    return [picture(t, height, width) for t in range(count)]


def encode(path: Path, frames: list, codec: str = "libx264", pix_fmt: str = "yuv420p", pts: list[int] | None = None,
           time_base: Fraction = Fraction(1, RATE), options: dict | None = None, rotation: int = 0,
           aspect: Fraction | None = None, sound: str | None = None, colour: tuple | None = None, shift: int = 0,
           start: int = 0, container: dict | None = None) -> Path:
    """Write frames (uint8 [H, W, 3], or av frames as they are) to a file of any kind.

    rotation: degrees counter-clockwise; colour: tags (matrix, range); sound: codec of a tone as long as the video;
    start: ticks before the first frame; shift: ticks taken off every packet's time, so that an mp4 hides the start by
    an edit list.
    """
    frames = [f if isinstance(f, av.VideoFrame) else av.VideoFrame.from_ndarray(f, format="rgb24") for f in frames]
    with av.open(str(path), "w", options=container or {}) as out:
        defaults = {"crf": "10"} if codec in ("libx264", "libx265") else {}
        stream = out.add_stream(codec, rate=RATE, options=defaults | (options or {}))
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
        if codec not in ("gif", "mpeg4"):
            stream.codec_context.time_base = time_base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if colour:
            stream.codec_context.colorspace, stream.codec_context.color_range = colour
        tone = out.add_stream(sound, rate=48000, layout="stereo") if sound else None
        packets = []
        for i, frame in enumerate(frames):
            frame.pts, frame.time_base = start + (pts[i] if pts else i), time_base
            packets += stream.encode(frame)
        packets += stream.encode()
        if tone:
            packets += encode_tone(tone, float(len(frames) * time_base), float(start * time_base))
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            out.mux(packet)
    return path


def encode_tone(stream: av.AudioStream, seconds: float, start: float) -> list[av.Packet]:
    wave = np.sin(np.arange(int(seconds * 48000)) * (2 * np.pi * 440 / 48000)).astype(np.float32) / 4
    packets = []
    for at in range(0, len(wave), 4800):
        frame = av.AudioFrame.from_ndarray(np.stack([wave[at : at + 4800]] * 2), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48000, at + int(start * 48000), Fraction(1, 48000)
        packets += stream.encode(frame)
    return packets + stream.encode()


def packets_of(path: Path, kind: str = "video") -> list[tuple[float, bytes]]:
    """(time in seconds, content) of the packets of a file's first stream of a kind, in the order of the file."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.dts is not None]


def break_frame(path: Path, number: int, junk: bool = False) -> Path:
    """Overwrite the packet of the frame shown as `number` with zeros, or after its first bytes with junk."""
    with av.open(str(path)) as container:
        places = sorted((p.pts, p.pos, p.size) for p in container.demux(video=0) if p.dts is not None)
    _, pos, size = places[number]
    data = bytearray(path.read_bytes())
    keep = 8 if junk else 0
    fill = np.random.default_rng(0).bytes(size - keep) if junk else bytes(size - keep)
    data[pos + keep : pos + size] = fill
    path.write_bytes(data)
    return path


def remux(source: Path, target: Path, change, metadata: dict | None = None) -> Path:
    """Copy the packets of a video; change(number, content, pts, dts) -> (content, pts, dts) of each."""
    with av.open(str(source)) as given, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        stream.metadata.update(metadata or {})
        for number, packet in enumerate(p for p in given.demux(video=0) if p.size):
            content, pts, dts = change(number, bytes(packet), packet.pts, packet.dts)
            copy = av.Packet(content)
            copy.pts, copy.dts, copy.time_base = pts, dts, packet.time_base
            copy.duration, copy.is_keyframe, copy.stream = packet.duration, packet.is_keyframe, stream
            out.mux(copy)
    return target


def times_of_decoding(source: Path, target: Path) -> Path:
    """Copy a video with B-frames and number its packets as they come, as `ffmpeg -fflags +genpts -c copy` does."""
    return remux(source, target, lambda number, content, pts, dts: (content, 1000 * number, 1000 * number))


class Bits:
    """A bit string with H.264's codes (ITU-T H.264, 7.2 and 9.1)."""

    def __init__(self):
        self.bits = []

    def u(self, *fields: tuple[int, int]) -> None:
        """(how many bits, value)"""
        for n, value in fields:
            self.bits += [value >> i & 1 for i in reversed(range(n))]

    def ue(self, *values: int) -> None:
        for value in values:
            self.u((2 * (value + 1).bit_length() - 1, value + 1))

    def align(self, *end: int) -> bytes:
        self.bits += end
        self.bits += [0] * (-len(self.bits) % 8)
        return np.packbits(np.array(self.bits, np.uint8)).tobytes()


def nal_unit(importance: int, kind: int, content: bytes) -> bytes:
    """H.264, 7.3.1: with a 3 after two zeros, so that nothing in it looks like a start code."""
    out, zeros = bytearray(), 0
    for byte in content:
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes([0, 0, 0, 1, importance << 5 | kind]) + bytes(out)


def field_pictures(levels: list[int]) -> list[bytes]:
    """Two packets for each frame, a field each, as AVCHD and 1080i broadcasts have them: 64x64, one grey, lossless."""
    sps = Bits()
    sps.u((8, 77), (8, 0), (8, 30))                        # main profile, level 3
    sps.ue(0, 0, 0, 4, 1)                                  # ids, frame numbers of 4 bits, picture order of 8
    sps.u((1, 0))
    sps.ue(3, 1)                                           # 4 macroblocks wide, 2 pairs of them high
    sps.u((1, 0), (1, 0), (1, 1), (1, 0), (1, 0))          # fields or frames; no cropping, no VUI
    pps = Bits()
    pps.ue(0, 0)
    pps.u((1, 0), (1, 0))
    pps.ue(0, 0, 0)
    pps.u((1, 0), (2, 0))
    pps.ue(0, 0, 0)
    pps.u((1, 1), (1, 0), (1, 0))
    packets = []
    for i, level in enumerate(levels):
        for bottom in (0, 1):
            key = not packets
            field = Bits()
            field.ue(0, 7, 0)                              # an I slice of the whole picture
            field.u((4, i % 16), (1, 1), (1, bottom))
            if key:
                field.ue(0)
            field.u((8, (2 * i + bottom) % 256), (2, 0) if key else (1, 0))
            field.ue(0, 1)
            for _ in range(4 * 2):
                field.ue(25)                               # I_PCM: 256 samples of luma and 128 of chroma follow
                field.align()
                field.bits += np.unpackbits(np.array([level] * 256 + [128] * 128, np.uint8)).tolist()
            parameters = nal_unit(3, 7, sps.align(1)) + nal_unit(3, 8, pps.align(1)) if key else b""
            packets.append(nal_unit(0, 9, b"\x10") + parameters + nal_unit(3, 5 if key else 1, field.align(1)))
    return packets


def yuv_frame(colour: tuple[int, int, int], matrix: tuple[float, float], full: bool, pix_fmt: str = "yuv420p",
              height: int = HEIGHT, width: int = WIDTH) -> av.VideoFrame:
    """One RGB colour as YUV by the definition (ITU-R BT.601 and BT.709, equations 3 and 4; H.273, 8.3)."""
    kr, kb = matrix
    r, g, b = (c / 255 for c in colour)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    levels = (255 * y, 128 + 255 * cb, 128 + 255 * cr) if full else (16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr)
    frame = av.VideoFrame(width, height, pix_fmt)
    for plane, level in zip(frame.planes, levels, strict=True):
        plane.update(bytes([min(255, round(level))]) * plane.buffer_size)
    return frame


def bytes_of(x):
    """[3, T, H, W] in [-1, 1] -> float [T, H, W, 3], 0 to 255."""
    return ((x + 1) * 127.5).permute(1, 2, 3, 0).double().round(decimals=3).numpy()


def read(path, **settings):
    """A video -> its frames [T, H, W, 3], 0 to 255, their times and durations in seconds, and the closed Video."""
    with Video(path, **settings) as video:
        frames = bytes_of(torch.stack(list(video), dim=1))
        times = [(pts * video.format.time_base, duration * video.format.time_base) for pts, duration in video.times]
    return frames, times, video


def copy(source, target, sound=True, **settings):
    """Read one file and write another, frame by frame."""
    with Video(source) as video, writing(target, video.format, sound=source if sound else None, **settings) as out:
        for frame in video:
            out.write(frame, *video.times.popleft())
    return target


def assert_close(frames, wanted, tolerance):
    wanted = np.stack(wanted).astype(float)
    assert frames.shape == wanted.shape
    difference = np.abs(frames - wanted).max()
    assert difference <= tolerance, f"largest difference {difference:.2f} of 255, tolerance {tolerance}"
