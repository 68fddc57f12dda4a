"""Sound: copied packet by packet or encoded as AAC, every track to its end."""

import av
import numpy as np
import pytest

from mirage_min.data.video import Video, writing
from tests.media import HEIGHT, RATE, WIDTH, copy, encode, packets_of, pictures


@pytest.mark.parametrize("name, codec", [("a.mp4", "aac"), ("a.mkv", "libopus"), ("a.mp4", "libmp3lame"),
                                         ("a.mkv", "flac")])
def test_sound_is_copied_packet_for_packet(tmp_path, name, codec):
    source = encode(tmp_path / name, pictures(15), sound=codec)
    out = copy(source, tmp_path / "out.mp4")
    wanted, given = packets_of(source, "audio"), packets_of(out, "audio")
    assert [content for _, content in given] == [content for _, content in wanted] and len(wanted) > 5
    assert max(abs(a - b) for (a, _), (b, _) in zip(wanted, given)) <= 1e-3, "seconds"


def test_sound_that_mp4_players_do_not_know_becomes_aac(tmp_path):
    source = encode(tmp_path / "in.mkv", pictures(15), sound="pcm_s16le")
    with av.open(str(copy(source, tmp_path / "out.mp4"))) as out:
        stream = out.streams.audio[0]
        assert (stream.name, stream.rate, stream.layout.name) == ("aac", 48000, "stereo")
        wave = np.concatenate([frame.to_ndarray()[0] for frame in out.decode(stream) if frame.pts >= 0])
    tone = np.sin(np.arange(48000 * 15 // RATE) * (2 * np.pi * 440 / 48000)) / 4
    assert len(wave) >= len(tone), "the end is missing"
    wave = wave[: len(tone)]
    error = np.sqrt(np.mean((wave[4000:-4000] - tone[4000:-4000]) ** 2)) / tone.std()
    assert error < 0.1, f"the tone came back with an error of {error:.3f} of its own size"


def test_sound_of_an_unknown_codec_is_left_out_and_that_is_said(tmp_path):
    data = encode(tmp_path / "in.mkv", pictures(3), sound="aac").read_bytes()
    assert data.count(b"A_AAC") == 1
    (tmp_path / "in.mkv").write_bytes(data.replace(b"A_AAC", b"A_XYZ"))
    with Video(tmp_path / "in.mkv") as video:
        assert video.notes == [f"{tmp_path / 'in.mkv'}: holds sound of an unknown codec, which is left out"]
    with av.open(str(copy(tmp_path / "in.mkv", tmp_path / "out.mp4"))) as out:
        assert not out.streams.audio and len(list(out.decode(video=0))) == 3


def test_sound_of_a_file_that_was_cut_off_ends_there(tmp_path):
    source = encode(tmp_path / "in.mp4", [np.random.default_rng(t).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
                                          for t in range(20)], sound="aac", container={"movflags": "faststart"})
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 6 // 10])
    with Video(source, skip_broken=True) as video, writing(tmp_path / "out.mp4", video.format, sound=source) as out:
        for frame in video:
            out.write(frame, *video.times.popleft())
    assert len(packets_of(tmp_path / "out.mp4")) == 20
    assert 3 < len(packets_of(tmp_path / "out.mp4", "audio")) < 90


@pytest.mark.parametrize("samples", [48000, 1920])
def test_every_track_is_encoded_to_its_end(tmp_path, samples):
    source = encode(tmp_path / "in.mkv", pictures(2))
    with av.open(str(source)) as frames, av.open(str(tmp_path / "two.mkv"), "w") as out:
        picture = out.add_stream_from_template(frames.streams.video[0])
        tracks = [out.add_stream("pcm_s16le", rate=48000, layout="mono") for _ in range(2)]
        for packet in frames.demux(video=0):
            if packet.size:
                packet.stream = picture
                out.mux(packet)
        for track in tracks:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.int16), format="s16", layout="mono")
            frame.sample_rate = 48000
            out.mux(track.encode(frame))
    with av.open(str(copy(tmp_path / "two.mkv", tmp_path / "out.mp4"))) as out:
        given = {track.index: 0 for track in out.streams.audio}
        for packet in out.demux(*out.streams.audio):
            given[packet.stream.index] += sum(frame.samples for frame in packet.decode())
    assert len(given) == 2 and all(0 <= n - samples < 2048 for n in given.values()), f"{samples} samples became {given}"
