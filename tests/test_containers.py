"""What the bytes of a container tell: a chain that is whole is passed, and one that breaks is noticed where it does."""

import io
import math
import struct

import av
import numpy as np
import pytest
from PIL import Image

from mirage_min.data import containers
from mirage_min.data.boxes import check_run, samples_told, spoilt
from mirage_min.data.containers import (
    avi_frames,
    flv_is_broken,
    gif_images,
    png_images,
    riff_missing,
    transport_is_broken,
    webp_images,
)
from mirage_min.data.matroska import Matroska, number
from mirage_min.data.video import read_clip
from tests.media import encode, picture, pictures


def chain(*elements: tuple[str, int | None, bytes]) -> bytes:
    """Elements of EBML by name in hex, length (None: not told) and content."""
    out = b""
    for name, length, content in elements:
        out += bytes.fromhex(name) + (b"\x01" + b"\xff" * 7 if length is None else b"\x08" + length.to_bytes(4, "big"))
        out += content
    return out


BLOCKS = chain(("e7", 1, b"\0"), ("a3", 12, b"\x81\0\0\x80xxxxxxxx"), ("a0", 12, chain(("a1", 6, b"\x81\0\0\x80yy"))))
TRACKS = chain(("1654ae6b", 13, chain(("ae", 7, chain(("d7", 1, b"\1"))))))


def file_of(cluster_told: bool = True, segment_told: bool = True, after: bytes = b"") -> bytes:
    """A Matroska file with one track and one cluster, whose lengths are told or not."""
    body = TRACKS + chain(("1f43b675", len(BLOCKS) if cluster_told else None, BLOCKS)) + after
    return chain(("1a45dfa3", 0, b""), ("18538067", len(body) if segment_told else None, body))


def breaks(path, data: bytes) -> bool:
    path.write_bytes(data)
    return Matroska(path).breaks_before(math.inf)


@pytest.mark.parametrize("segment", [True, False])
@pytest.mark.parametrize("cluster", [True, False])
def test_a_whole_chain_passes_whether_its_lengths_are_told_or_not(tmp_path, cluster, segment):
    path = tmp_path / "a.mkv"
    assert not breaks(path, file_of(cluster, segment))
    tags = chain(("1254c367", 3, b"xyz"))
    assert not breaks(path, file_of(cluster, segment, after=tags)), "tags follow the cluster"
    if segment:
        assert not breaks(path, file_of(cluster, segment) + b"bytes that somebody appended")


@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_what_libav_writes_is_whole_and_each_packet_lies_in_a_block(tmp_path, name):
    path = encode(tmp_path / name, pictures(6), "libvpx-vp9", sound="libopus")
    data = path.read_bytes()
    names = [data[place] for place in Matroska(path).places()]
    assert not breaks(path, data) and sum(first in (0xA3, 0xA1) for first in names) > 12


BLOCK = b"\xa3\x08\0\0\0\x0c"


@pytest.mark.parametrize("old, new, why", [
    (BLOCK, b"\xa7" + BLOCK[1:], "a block has become a Position, of more than eight bytes"),
    (BLOCK, b"\xb3" + BLOCK[1:], "a block has become an element that no cluster holds"),
    (BLOCK, BLOCK[:-1] + b"\x8c", "a length reaches beyond the cluster"),
    (BLOCK, BLOCK[:-1] + b"\x0b", "a length ends within the block"),
    (BLOCK, b"\xa3\0" + BLOCK[2:], "a length of no number of bytes"),
    (b"\x81\0\0\x80xx", b"\x85\0\0\x80xx", "a block of a track that the file has not"),
    (b"\x1f\x43\xb6\x75", b"\x1f\x43\xb6\x74", "a cluster has become an element that no segment holds"),
    (b"\xa1\x08", b"\xa0\x08", "a group within a group")])
def test_one_wrong_bit_breaks_the_chain(tmp_path, old, new, why):
    data = file_of()
    assert data.count(old) == 1 and breaks(tmp_path / "a.mkv", data.replace(old, new)), why


@pytest.mark.parametrize("flags, content, wanted", [
    (0x80, b"xxxxxxxx", 1), (0x00, b"x", 1), (0x80, b"", 0),
    (0x82, b"\2xxxxxx", 3), (0x86, b"\3xxxxxx", 4), (0x04, b"\0xxxxxx", 1)])  # laced: how many follow the first
def test_the_frames_of_a_video_are_counted_in_its_blocks(tmp_path, flags, content, wanted):
    tracks = chain(("1654ae6b", 40, chain(("ae", 14, chain(("83", 1, b"\2"), ("d7", 1, b"\5"))),
                                          ("ae", 14, chain(("d7", 1, b"\1"), ("83", 1, b"\1"))))))
    blocks = chain(*[("a3", 4 + len(content), bytes([0x81, 0, 0, flags]) + content)] * 3, ("a3", 6, b"\x85\0\0\x80yy"))
    body = tracks + chain(("1f43b675", len(blocks), blocks))
    (tmp_path / "a.mkv").write_bytes(chain(("1a45dfa3", 0, b""), ("18538067", len(body), body)) + bytes(9))
    found = Matroska(tmp_path / "a.mkv")
    assert not found.breaks_before(math.inf)
    assert (found.frames_of_video(0), found.frames_of_video(1)) == (3 * wanted, 0)


def test_a_break_is_told_once_and_not_before_its_place(tmp_path):
    data = file_of()
    at = data.index(BLOCK)
    (tmp_path / "a.mkv").write_bytes(data.replace(BLOCK, b"\xb3" + BLOCK[1:]))
    chain = Matroska(tmp_path / "a.mkv")
    assert [chain.breaks_before(at), chain.breaks_before(at + 1), chain.breaks_before(math.inf)] == [False, True, False]


@pytest.mark.parametrize("told", [True, False])
def test_a_file_is_cut_off_if_its_segment_says_how_long_it_is(tmp_path, told):
    data = file_of(segment_told=told)
    for left in range(data.index(BLOCK), len(data)):
        assert breaks(tmp_path / "a.mkv", data[:left]) == told, f"{left} of {len(data)} bytes left"


def test_an_avi_is_cut_off_if_it_is_shorter_than_its_chunks(tmp_path):
    path = tmp_path / "a.avi"
    riff = b"RIFF" + (5).to_bytes(4, "little") + b"AVI x\0"
    unknown = [b"RIFF" + bytes(4) + b"AVI ", b"RIFF" + b"\xff" * 4 + b"AVI "]
    whole = [riff, riff[:-1], 2 * riff, riff + b"junk at the end", *unknown]
    for data, wanted in [(data, False) for data in whole] + [(riff[:-2], True), (riff + riff[:-3], True)]:
        path.write_bytes(data)
        assert (riff_missing(path) > 0) == wanted, data


@pytest.mark.parametrize("settings", [{}, {"transparency": 3, "disposal": 2}, {"comment": b"a comment", "loop": 0}])
def test_the_images_of_a_gif_are_counted_and_its_trailer_is_missed(tmp_path, settings):
    images = [Image.fromarray(picture).quantize(17 * (n + 1)) for n, picture in enumerate(pictures(5, 20, 30))]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=100, **settings)
    path, data = tmp_path / "a.gif", file.getvalue()
    path.write_bytes(data + b"appended")
    assert gif_images(path) == (5, True)
    counts = []
    for left in range(0, len(data), 7):
        path.write_bytes(data[:left])
        count, whole = gif_images(path)
        counts.append(count)
        assert not whole
    assert counts == sorted(counts) and counts[-1] == 5


def test_an_image_of_a_gif_that_swallows_the_next_is_noticed(tmp_path):
    """A spoilt length lets pixels run on into the head of the next image, and the chain may come right later."""
    head = b"GIF89a" + bytes([2, 0, 2, 0, 0, 0, 0])
    image = b"\x21\xf9\x04\0\x0a\0\0\0" + b"\x2c" + bytes([0, 0, 0, 0, 2, 0, 2, 0, 0]) + b"\2" + b"\3abc" + b"\0"
    path = tmp_path / "a.gif"
    path.write_bytes(head + 3 * image + b"\x3b")
    assert gif_images(path) == (3, True)
    longer = bytearray(head + 3 * image + b"\x3b")
    at = len(head) + len(image) - 5
    assert longer[at] == 3
    longer[at] += len(image)
    path.write_bytes(longer)
    assert gif_images(path) == (2, False)


def test_the_samples_that_a_track_tells_of_are_counted(tmp_path):
    def box(name: bytes, *content: bytes) -> bytes:
        return (8 + len(b"".join(content))).to_bytes(4, "big") + name + b"".join(content)

    def track(samples: int) -> bytes:
        sizes = box(b"stsz", bytes(8) + samples.to_bytes(4, "big"))
        return box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", box(b"stts", bytes(8)), sizes))))
    path = tmp_path / "a.avif"
    for data, wanted in ((box(b"ftyp", b"avis"), 0), (box(b"moov", track(6)), 6),
                         (box(b"moov", track(2), track(300)), 300), (box(b"moov", track(6))[:-1], 0)):
        path.write_bytes(data)
        assert samples_told(path) == wanted


def test_numbers_of_ebml_are_those_of_its_definition():
    """RFC 8794, 4.1: as many leading zeros as bytes follow, then a 1, then the value."""
    for n in range(1, 9):
        for value in {0, 1, 2 ** (7 * n) - 2, int(np.random.default_rng(n).integers(2 ** (7 * n) - 1))}:
            coded = (value | 1 << 7 * n).to_bytes(n, "big")
            assert number(coded + b"\xff") == number(coded) == (value, n)
            with pytest.raises(IndexError):
                number(coded[:-1])
    with pytest.raises(ValueError, match="no number"):
        number(b"\0" + bytes(9))


@pytest.mark.parametrize("length, missing, cut", [(6, 0, 0), (6, 1, 1), (5, 0, 0), (5, 1, 0),
                                                  (5, 2, 1)])
def test_an_avi_may_lack_what_fills_up_its_last_chunk_and_nothing_else(tmp_path, length, missing, cut):
    whole = b"RIFF" + length.to_bytes(4, "little") + bytes(length + length % 2)
    (tmp_path / "a.avi").write_bytes(whole[: len(whole) - missing])
    assert riff_missing(tmp_path / "a.avi") == cut


def chunk(name: bytes, content: bytes, fill: bool = True) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2 * fill)


def avi(packets: bytes, after: bytes = b"", length: int | None = None) -> bytes:
    """An AVI of a header and these packets; `length` instead of the RIFF's."""
    content = b"AVI " + chunk(b"LIST", b"hdrl" + chunk(b"avih", bytes(5))) + chunk(b"LIST", b"movi" + packets) + after
    return b"RIFF" + (len(content) if length is None else length).to_bytes(4, "little") + content


PACKETS = [chunk(b"00dc", b"\1\2\3"), chunk(b"01wb", b"\1" * 6), chunk(b"00dc", b""), chunk(b"00pc", b"\1\2"),
           chunk(b"ix00", b"\1" * 8), chunk(b"JUNK", b"\0" * 4), chunk(b"00db", b"\5" * 10)]  # of stream 0: two frames


def test_the_frames_of_an_avi_are_counted_by_its_chunks(tmp_path):
    packets, index = b"".join(PACKETS), chunk(b"idx1", bytes(32))
    unfilled = [chunk(b"00dc", b"\1" * 3, fill=False) + chunk(b"00dc", b"\1" * 5, fill=False)]
    whole = {"plain": (avi(packets, index), 2), "lists of packets": (avi(chunk(b"LIST", b"rec " + packets) * 2), 4),
             "two RIFFs": (avi(packets, index) + avi(packets), 4), "not filled up": (avi(unfilled[0], index), 2),
             "junk at the end": (avi(packets, index) + b"junk at the end", 2), "no packets": (avi(b"", index), 0),
             "length never filled in, cut": (avi(packets, length=0)[:-3], 1), "another form": (b"RIFF\0\0\0\0AMV ", 0)}
    for what, (data, count) in whole.items():
        (tmp_path / "a.avi").write_bytes(data)
        assert avi_frames(tmp_path / "a.avi", 0, 2) == count, what


@pytest.mark.parametrize("last", [b"\5" * 6, b"\5" * 7])
@pytest.mark.parametrize("index", [b"", chunk(b"idx1", bytes(32)), chunk(b"JUNK", bytes(3))])
def test_whatever_follows_the_last_chunk_of_an_avi_is_no_part_of_its_chain(tmp_path, last, index):
    """A few bytes are fewer than a chunk's head; more may look like one, behind a RIFF that says where it ends."""
    packets, path = b"".join(PACKETS) + chunk(b"00dc", last), tmp_path / "a.avi"
    for more in range(30):
        path.write_bytes(avi(packets, index) + b"junk that somebody put there "[:more])
        assert avi_frames(path, 0, 2) == 3, f"{more} bytes follow"
    for more in range(8):
        path.write_bytes(avi(packets, index, length=0) + b"01wb\1\0\0"[:more])
        assert avi_frames(path, 0, 2) == 3, f"{more} bytes follow a RIFF whose length was never filled in"


def test_the_chain_of_an_avi_breaks_where_a_byte_was_put_in_or_a_name_is_spoilt(tmp_path):
    data, path = avi(b"".join(PACKETS), chunk(b"idx1", bytes(32))), tmp_path / "a.avi"
    movi, index = data.index(b"movi") + 4, data.index(b"idx1")
    for at in range(movi, index):
        path.write_bytes(data[:at] + b"\xff" + data[at:])
        assert avi_frames(path, 0, 2) is None, f"a byte put in at {at}"
    for name in (b"00dc", b"01wb", b"00db"):
        at = data.index(name)
        for other in (b"p" + name[1:], b"1" + name[1:], b"02" + name[2:], bytes(4)):
            path.write_bytes(data[:at] + other + data[at + 4 :])
            assert avi_frames(path, 0, 2) is None, (name, other)


@pytest.fixture(scope="module")
def transport(tmp_path_factory):
    """A transport stream of 24 frames, a key frame every six; the number of its video."""
    path = encode(tmp_path_factory.mktemp("ts") / "a.ts", pictures(24), options={"g": "6"}, sound="aac")
    with av.open(str(path)) as file:
        return path.read_bytes(), file.streams.video[0].id


def of_video(data: bytes, pid: int) -> list[int]:
    """Where the packets of a stream are."""
    return [at for at in range(0, len(data), 188) if (data[at + 1] & 31) * 256 + data[at + 2] == pid]


LAYOUTS = {"188 bytes": lambda d: d, "junk before": lambda d: b"\1\2\3" + d,
           "192 bytes": lambda d: b"".join(b"\0\0\0\0" + d[i : i + 188] for i in range(0, len(d), 188)),
           "204 bytes": lambda d: b"".join(d[i : i + 188] + bytes(16) for i in range(0, len(d), 188))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at_once", [7, containers.AT_ONCE])
def test_a_whole_transport_stream_is_whole_and_one_cut_off_is_not(transport, tmp_path, monkeypatch, layout, at_once):
    data, pid = transport
    monkeypatch.setattr(containers, "AT_ONCE", at_once)
    path = tmp_path / "a.ts"
    path.write_bytes(LAYOUTS[layout](data))
    assert not transport_is_broken(path, pid)
    path.write_bytes(LAYOUTS[layout](data)[:-70])
    assert transport_is_broken(path, pid)


@pytest.mark.parametrize("at_once", [1, 7, containers.AT_ONCE])
def test_what_is_missing_from_a_transport_stream_is_missed(transport, tmp_path, monkeypatch, at_once):
    data, pid = transport
    monkeypatch.setattr(containers, "AT_ONCE", at_once)
    ours, path = of_video(data, pid), tmp_path / "a.ts"
    changes = {"a packet": data[: ours[9]] + data[ours[10] :], "four bytes": data[:5000] + data[5004:],
               "a byte more": data[:5000] + b"x" + data[5000:], "600 zeros": data[:5000] + bytes(600) + data[5600:],
               "nothing but junk": bytes(range(256)) * 40, "nothing": b""}
    for what, changed in changes.items():
        path.write_bytes(changed)
        assert transport_is_broken(path, pid), what


def test_recordings_that_were_joined_are_whole(transport, tmp_path):
    data, pid = transport
    (tmp_path / "a.ts").write_bytes(data + data)
    assert not transport_is_broken(tmp_path / "a.ts", pid)


def test_a_frame_of_a_transport_stream_whose_first_bytes_are_spoilt_is_missed(transport, tmp_path):
    """It is in one packet of 188 bytes, so that no number is missing."""
    data, pid = transport
    starts = [at for at in of_video(data, pid) if data[at + 1] & 0x40]
    for at in starts:
        begin = at + (5 + data[at + 4] if data[at + 3] & 0x20 else 4)
        assert data[begin : begin + 3] == b"\0\0\1"
        (tmp_path / "a.ts").write_bytes(data[:begin] + b"\0\0\5" + data[begin + 3 :])
        assert transport_is_broken(tmp_path / "a.ts", pid)


# ---- mp4 and mov -----------------------------------------------------------------------------------------------------

def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return (8 + len(body)).to_bytes(4, "big") + name + body


def full(name: bytes, flags: int, *numbers: int) -> bytes:
    return box(name, *((n).to_bytes(4, "big") for n in (flags, *numbers)))


MEDIA = box(b"mdia", full(b"mdhd", 0), full(b"hdlr", 0), box(b"minf", box(b"stbl")))
MOVIE = box(b"moov", full(b"mvhd", 0), box(b"trak", full(b"tkhd", 0), MEDIA), box(b"udta", bytes(4)))
PIECES = box(b"moov", full(b"mvhd", 0), box(b"trak", full(b"tkhd", 0), MEDIA), box(b"mvex", full(b"trex", 0, 7)))
RUN = full(b"trun", 0x205, 2, 100, 0, 30, 40)            # two sizes after the data's place and the first one's flags
FRAGMENT = box(b"moof", full(b"mfhd", 0, 1), box(b"traf", full(b"tfhd", 0, 7), full(b"tfdt", 0, 0), RUN))
HEAD, DATA = box(b"ftyp", b"isom"), box(b"mdat", bytes(70))


def test_boxes_that_fit_into_each_other_are_whole(tmp_path):
    whole = {"a movie": HEAD + MOVIE + DATA, "its data first": HEAD + DATA + MOVIE, "fragments": HEAD + PIECES
             + (FRAGMENT + DATA) * 3, "data to the end of the file": HEAD + PIECES + FRAGMENT + bytes(4) + DATA[4:],
             "a length of 64 bits": HEAD + MOVIE + bytes(3) + b"\1mdat" + (86).to_bytes(8, "big") + bytes(70),
             "an unknown box": HEAD + MOVIE + box(b"beam") + DATA, "zeros at the end": HEAD + MOVIE + bytes(4),
             "data of a movie cut off, as its tables tell": (HEAD + MOVIE + DATA)[:-9], "nothing": b""}
    for what, data in whole.items():
        (tmp_path / "a.mp4").write_bytes(data)
        assert not spoilt(tmp_path / "a.mp4"), what


@pytest.mark.parametrize("old, new", [(b"mdhd", b"mdhe"), (b"tkhd", b"tkhx"), (b"hdlr", bytes(4)), (b"minf", b"mind"),
                                      (b"stbl", b"stbx"), (b"mdia", b"mdii"), (MEDIA[:4], b"\0\0\x7f\0")])
def test_a_track_that_lacks_what_it_is_read_by_is_spoilt(tmp_path, old, new):
    data = HEAD + MOVIE + DATA
    assert data.count(old) == 1
    (tmp_path / "a.mp4").write_bytes(data.replace(old, new))
    assert spoilt(tmp_path / "a.mp4")


@pytest.mark.parametrize("old, new", [
    (b"moof", b"moog"), (b"traf", b"trag"), (b"tfhd", b"tfhe"), (b"trun", b"true"), (b"mfhd", b"mfhe"),
    (b"tfdt", b"tfdu"), (b"mdat", b"mdas"), (b"trex", b"trew"), (full(b"tfhd", 0, 7), full(b"tfhd", 0, 6)),
    (full(b"trex", 0, 7), full(b"trex", 0, 2**24 + 7)),
    (RUN, full(b"trun", 0x205, 1, 100, 0, 30, 40)), (RUN, full(b"trun", 0x201, 2, 100, 0, 30, 40)),
    (FRAGMENT[:4], bytes(3) + b"\x70"), (DATA, DATA[:-1]), (DATA, DATA + bytes(3) + b"\5abcdefgh")])
def test_a_fragment_that_does_not_fit_is_spoilt(tmp_path, old, new):
    data = HEAD + PIECES + FRAGMENT + DATA
    assert data.count(old) == 1
    (tmp_path / "a.mp4").write_bytes(data.replace(old, new))
    assert spoilt(tmp_path / "a.mp4")


def test_boxes_in_boxes_beyond_any_depth_are_spoilt(tmp_path):
    nested = b""
    for _ in range(2000):
        nested = box(b"moov", nested)
    (tmp_path / "a.mp4").write_bytes(HEAD + MOVIE + DATA + nested)
    assert spoilt(tmp_path / "a.mp4")


def test_a_run_of_millions_of_samples_has_their_size():
    check_run((0xF00).to_bytes(4, "big") + (2**24).to_bytes(4, "big"), 8 + 16 * 2**24)
    with pytest.raises(ValueError, match="16777216 samples in 12 bytes"):
        check_run((0x201).to_bytes(4, "big") + (2**24).to_bytes(4, "big"), 12)


# ---- Flash video -----------------------------------------------------------------------------------------------------

def tag(kind: int, content: bytes) -> bytes:
    size = len(content)
    return bytes([kind]) + size.to_bytes(3, "big") + bytes(7) + content + (11 + size).to_bytes(4, "big")


def test_the_tags_of_a_flash_video_are_a_chain_to_its_end(tmp_path):
    head, path = b"FLV\1\5\0\0\0\x09" + bytes(4), tmp_path / "a.flv"
    told = tag(18, b"\0\x08filesize\0" + struct.pack(">d", 97))
    data = head + told + tag(9, bytes(10)) + tag(8, bytes(20))
    assert len(data) == 13 + 34 + 25 + 35
    video = len(head + told)
    for what, changed, broken in [
            ("whole", data, False), ("without the last length", data[:-4], False), ("cut off", data[:-5], True),
            ("cut between two tags", data[:72], True),
            ("a tag of another kind", data[:video] + b"\3" + data[video + 1 :], True),
            ("a length that is spoilt", data[: video + 3] + b"\x0b" + data[video + 4 :], True)]:
        path.write_bytes(changed)
        assert flv_is_broken(path) == broken, what


@pytest.mark.parametrize("name", [b"acTL", b"fcTL"])
def test_an_animated_png_whose_chunks_are_spoilt_is_missed(tmp_path, name):
    images = [Image.fromarray(picture(20 * t)) for t in range(5)]
    path = tmp_path / "a.png"
    images[0].save(path, save_all=True, append_images=images[1:])
    data = path.read_bytes()
    assert png_images(path) == 5 and read_clip(path).shape[1] == 5
    at = data.rindex(name)
    path.write_bytes(data[:at] + b"juNK" + data[at + 4 :])
    with pytest.raises(ValueError, match="a.png: (frame . .* does not decode|cannot be read as a picture)"):
        read_clip(path)


def test_a_webps_chunks_are_counted(tmp_path):
    images = [Image.fromarray(picture(20 * t)) for t in range(5)]
    path = tmp_path / "a.webp"
    images[0].save(path, save_all=True, append_images=images[1:])
    data = path.read_bytes()
    assert webp_images(path) == (5, True)
    path.write_bytes(data[:-9])
    assert webp_images(path) == (5, False)
    images[0].save(path)
    assert webp_images(path) == (0, True)
    for name in (b"VP8 ", b"ANMF"):                      # a picture that Pillow no longer finds
        at = data.rindex(name)
        path.write_bytes(data[:at] + b"JUNK" + data[at + 4 :])
        with pytest.raises(ValueError, match="a.webp: frame . .* does not decode"):
            read_clip(path)
