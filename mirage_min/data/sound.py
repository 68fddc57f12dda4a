"""The sound of a video file, taken over into the mp4 that is made of its frames: copied, or encoded as AAC.

mp4 holds many codecs, and players of mp4 know a few: what they know is copied packet by packet, without loss; the rest
(Vorbis, PCM, ...) is decoded and encoded as AAC. Every track keeps its place in time. Damaged packets are passed over.

    python -m mirage_min.data.sound           # two tracks of PCM, and what becomes of them
"""

import math
from collections.abc import Iterator
from pathlib import Path

import av

from .decode import clock_start, decode_packet, open_file, packets

MP4_SOUND = {"aac", "ac3", "alac", "eac3", "flac", "mp3", "mp3float", "opus"}
AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000}
AAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}


def copy_sound(path: Path, out: av.container.OutputContainer) -> Iterator[float]:
    """Mux the sound of a file into `out`, packet by packet; yields up to which second it is written."""
    with open_file(path) as container:
        streams = [s for s in container.streams.audio if s.codec_context is not None and s.rate]
        into = {s.index: sound_track(out, s) for s in streams}
        latest = dict.fromkeys(into, -math.inf)
        yield -math.inf
        for packet in packets(container, streams):
            stream, target, end = packet.stream, into[packet.stream.index], packet.dts is None
            start = round(clock_start(container) / stream.time_base)
            if not end and packet.dts <= latest[stream.index]:
                continue  # a broadcast stream may go back in time, an mp4 not
            latest[stream.index] = packet.dts
            seconds = None if end else float((packet.dts - start) * stream.time_base)
            if stream.name not in MP4_SOUND:
                for frame in decode_packet(packet)[0] + [None] * end:  # None: the encoder hands out what it still holds
                    if start and frame is not None:
                        frame.pts -= start
                    out.mux(target.encode(frame))
            elif not end:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, target
                out.mux(packet)
            if not end:  # the ends of all streams come together, and all of them must be written
                yield seconds


def sound_track(out: av.container.OutputContainer, stream: av.AudioStream) -> av.AudioStream:
    """A stream of `out` for the packets of `stream`, or for the AAC that is made of them."""
    if stream.name in MP4_SOUND:
        return out.add_stream_from_template(stream)
    rate = stream.rate if stream.rate in AAC_RATES else 48000
    return out.add_stream("aac", rate=rate, layout=AAC_LAYOUTS.get(stream.layout.nb_channels, "stereo"))


if __name__ == "__main__":
    import tempfile

    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        with av.open(f"{folder}/in.mkv", "w") as file:
            tracks = [file.add_stream("pcm_s16le", rate=48000, layout="mono") for _ in range(2)]
            for track, hertz in zip(tracks, (220, 440)):
                wave = np.sin(np.arange(48000) * 2 * np.pi * hertz / 48000)
                frame = av.AudioFrame.from_ndarray((wave * 8000).astype(np.int16)[None], format="s16", layout="mono")
                frame.sample_rate = 48000
                file.mux(track.encode(frame))
        with av.open(f"{folder}/out.mp4", "w") as file:
            for _ in copy_sound(Path(folder, "in.mkv"), file):
                pass
        for name in ("in.mkv", "out.mp4"):
            with av.open(f"{folder}/{name}") as file:
                for track in file.streams.audio:
                    file.seek(0)
                    print(f"{name}: {track.name}, {sum(frame.samples for frame in file.decode(track))} samples")
