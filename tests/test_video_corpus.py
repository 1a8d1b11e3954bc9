"""Files that are not as they should be: frames or one clear error, never a hang, a leak or another exception."""

import gc
import io
import logging
import os
import resource
import time

import av
import numpy as np
import pytest

from make_clips import damage, make_audio, make_video, number_of
from mplug2.data import MediaError, Transform, load, read_clip, read_video, read_videos
from mplug2.data.sampling import middle_indices


@pytest.fixture(scope="module")
def clip() -> bytes:
    return make_video(60)


def test_every_bad_file_has_its_message(tmp_path, clip):
    def file(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    os.mkfifo(tmp_path / "pipe")
    header = clip.index(b"moov") - 4
    for source, reason in (
        (str(tmp_path / "missing.mp4"), "cannot be opened (No such file or directory); check the path"),
        ("https://example.org/a.mp4", "only local files are read"),
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "pipe"), "is not a regular file"),
        (file("empty.mp4", b""), "is empty (0 bytes)"),
        (file("page.mp4", b"<html>404 not found</html>"), "is a text file"),
        (file("list.m3u8", b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n"), "is a text file"),
        (file("list.ffconcat", "ffconcat version 1.0\nfile 'héron.mp4'\n".encode("latin-1")), "is a text file"),
        (file("noise.mp4", np.random.default_rng(0).bytes(5000)), "is not a video that can be read"),
        (file("cut.mp4", clip[:header]), "is not a video that can be read"),
        (file("sound.mp4", make_audio()), "holds no video, only audio streams"),
        (file("header.mkv", make_video(9, container="matroska")[:600]), "holds no video frames"),
        (file("zeros.mp4", clip[:60] + bytes(header - 64) + clip[header - 4 :]), "no frame of it can be decoded"),
    ):
        with pytest.raises(MediaError) as caught:
            read_video(source, num_frames=4)
        assert str(caught.value).startswith(f"{source}: "), str(caught.value)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
        assert (caught.value.name, f"{source}: {caught.value.reason}") == (source, str(caught.value))


def test_bad_objects_are_named_too(tmp_path, clip):
    (tmp_path / "text.txt").write_text("words")
    with (tmp_path / "text.txt").open() as file, pytest.raises(MediaError, match=r"text\.txt: is open in text mode"):
        read_video(file, num_frames=4)
    closed = io.BytesIO(clip)
    closed.close()
    with pytest.raises(MediaError, match="<BytesIO>: cannot be read"):
        read_video(closed, num_frames=4)
    with pytest.raises(MediaError, match="<0 bytes>: is empty"):
        read_video(b"", num_frames=4)
    with pytest.raises(MediaError, match="is not a path"):
        read_video("a\0b", num_frames=4)

    class Broken(io.BytesIO):
        def read(self, size=-1):
            if size > 4096:  # the first look at a source takes 4096 bytes, a demuxer more
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(MediaError, match="<Broken>: "):
        read_video(Broken(clip), num_frames=4)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi", "h264"])
def test_damage_costs_only_the_frames_it_hits(container, caplog):
    content = damage(make_video(300, container=container, height=128, width=192), share=0.01)
    with caplog.at_level(logging.WARNING, "mplug2"):
        clip = read_clip(content, num_frames=30)
    assert clip.frames.shape == (30, 128, 192, 3)
    assert len(clip.times) == 30
    shown = [number_of(frame) for frame in clip.frames]
    # Matroska loses whole runs of frames where a block is hit, but the times of the others stay.
    expected = np.multiply(clip.times, 25) if container == "matroska" else middle_indices(0, 300, 30)
    assert np.median(np.abs(np.subtract(shown, expected))) <= 2
    assert bool(caplog.records) == bool(clip.num_skipped)


def overwrite_packets(content: bytes, begin: int, end: int, *, spare: int = 0) -> bytes:
    """The same file with noise for the packets [begin, end), but for their first `spare` bytes."""
    with av.open(io.BytesIO(content)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    broken, at = bytearray(content), 0
    for i, packet in enumerate(packets):
        at = content.index(packet, at)
        if begin <= i < end:
            broken[at + spare : at + len(packet)] = b"\xff" * (len(packet) - spare)
        at += len(packet)
    return bytes(broken)


def test_packets_that_do_not_decode_are_skipped_and_counted(caplog):
    """One group of eight frames is overwritten: its frames are replaced by the first of the next."""
    content = make_video(48, keyframes=8, b_frames=0, options={"x264-params": "scenecut=0"})
    with caplog.at_level(logging.WARNING, "mplug2"):
        clip = read_clip(overwrite_packets(content, 8, 16), num_frames=48)
    found = [number_of(f) for f in clip.frames]
    assert found[:8] == list(range(8))
    assert found[16:] == list(range(16, 48))
    assert set(found[8:16]) == {16}
    assert clip.num_skipped == 8
    assert "skipped 8 packets" in caplog.text


@pytest.mark.parametrize("container", ["matroska", "mpegts", "avi", "h264", "flv"])
def test_a_truncated_file_gives_what_is_left(container):
    content = make_video(60, container=container, height=256, width=384)
    clip = read_clip(content[: len(content) // 2], num_frames=8)
    found = [number_of(f) for f in clip.frames]
    assert found == sorted(found)
    assert 10 < clip.num_total < 50
    assert found[-1] < clip.num_total


def test_a_damaged_end_gives_the_last_frame_before_it():
    """The first byte says keyframe, so the decoder jumps; as nothing decodes there, it begins again from the first."""
    content = make_video(60, container="webm", codec="libvpx", keyframes=10)
    frames = read_video(overwrite_packets(content, 20, 60, spare=1), num_frames=1)
    assert [number_of(frame) for frame in frames] == [19]


def test_a_playlist_opens_no_other_file(tmp_path):
    """Zero bytes make it pass for media at first sight."""
    segment = tmp_path / "segment.ts"
    segment.write_bytes(make_video(60, container="mpegts"))
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{segment}\n#EXT-X-ENDLIST\n\0")
    with pytest.raises(MediaError, match=r"list\.m3u8: is not a video that can be read"):
        read_video(playlist, num_frames=2)


def test_times_that_go_back_are_not_trusted():
    content = make_video(20, container="mpegts", start_time=10) + make_video(20, container="mpegts")
    assert [number_of(f) for f in read_video(content, num_frames=40)] == [*range(20), *range(20)]


def test_times_that_span_years_are_not_trusted():
    content = make_video(20, container="matroska", times=[*range(19), 2e8])
    clip = read_clip(content, num_frames=4, sampling="fps", fps=5)
    assert [number_of(f) for f in clip.frames] == [2, 7, 12, 17]
    assert clip.times == pytest.approx([2 / 25, 7 / 25, 12 / 25, 17 / 25])


def test_frames_that_an_edit_cuts_off_do_not_count():
    clip = read_clip(make_video(60, start_time=-0.4, b_frames=0), num_frames=5)
    assert clip.num_total == 50
    assert [number_of(f) for f in clip.frames] == [10 + i for i in middle_indices(0, 50, 5)]


def test_streams_that_appear_out_of_noise_are_passed_over():
    content = make_video(30, container="mpegts")
    for seed in (23, 241, 250):  # with these PyAV meets packets of streams that it does not know
        noisy = np.frombuffer(content, np.uint8).copy()
        rng = np.random.default_rng(seed)
        noisy[rng.integers(0, len(noisy), 20)] = rng.integers(0, 256, 20)
        assert read_video(noisy.tobytes(), num_frames=8).shape == (8, 64, 96, 3)


def test_a_header_that_claims_giant_pictures_is_an_error(clip):
    size = np.array([65535, 65535], ">u2").tobytes()
    at = clip.index(b"avc1", clip.index(b"stsd")) + 4 + 24
    with pytest.raises(MediaError):
        read_video(make_giant(), num_frames=1)
    frames = read_video(clip[:at] + size + clip[at + 4 :], num_frames=1)  # the stream itself knows better
    assert frames.shape == (1, 64, 96, 3)


def make_giant() -> bytes:
    """A y4m header of 60,000 x 60,000 pixels before a few bytes of picture."""
    return b"YUV4MPEG2 W60000 H60000 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(10_000)


def test_batches_raise_skip_or_substitute(tmp_path, clip, caplog):
    other = make_video(30)
    sources = [clip, b"not a video", other, str(tmp_path / "missing.mp4")]
    with pytest.raises(MediaError, match="is a text file"):
        read_videos(sources, num_frames=2)
    with caplog.at_level(logging.WARNING, "mplug2"):
        skipped = read_videos(sources, num_frames=2, on_error="skip")
    assert skipped.indices == [0, 2]
    assert [number_of(c.frames[0]) for c in skipped.clips] == [14, 7]
    assert sorted(skipped.errors) == [1, 3]
    assert skipped.num_failed == 2
    assert "missing.mp4" in caplog.text
    substituted = read_videos(sources, num_frames=2, on_error="substitute")
    assert substituted.indices == [0, 2, 2, 0]  # the next that can be read, from the beginning again at the end
    assert [number_of(c.frames[0]) for c in substituted.clips] == [14, 7, 7, 14]
    assert read_videos([], num_frames=2).clips == []
    with pytest.raises(MediaError, match="2 files: none can be read; the first: "):
        read_videos([b"", b""], num_frames=2, on_error="substitute")
    with pytest.raises(ValueError, match="raise, skip or substitute, got 'ignore'"):
        read_videos(sources, num_frames=2, on_error="ignore")


def test_random_damage_gives_frames_or_the_one_error():
    """300 broken files of 9 kinds: each is read within a second or refused."""
    kinds = [
        make_video(30),
        make_video(30, container="matroska"),
        make_video(30, container="mpegts"),
        make_video(30, container="avi", codec="mpeg4"),
        make_video(30, container="h264"),
        make_video(30, container="flv"),
        make_video(30, container="gif", codec="gif", pix_fmt="rgb8"),
        make_video(30, container="webm", codec="libvpx"),
        make_video(30, container="mpeg", codec="mpeg2video"),
    ]
    rng = np.random.default_rng(7)
    transform = Transform(32)
    num_read = 0
    for i in range(300):
        broken = np.frombuffer(kinds[i % len(kinds)], np.uint8).copy()
        at = int(rng.integers(len(broken)))
        if i % 4 == 0:
            broken = broken[: at + 1]
        elif i % 4 == 1:
            broken[rng.integers(0, len(broken), 20)] = rng.integers(0, 256, 20)
        elif i % 4 == 2:
            broken[rng.integers(0, min(len(broken), 1500), 4)] = rng.integers(0, 256, 4)
        else:
            broken = np.concatenate([broken[:at], broken[at + int(rng.integers(1, 500)) :]])
        begun = time.process_time()
        try:
            assert load(broken.tobytes(), transform, num_frames=8).shape[-2:] == (32, 32)
            num_read += 1
        except MediaError:
            pass
        assert time.process_time() - begun < 5  # no hang; usually some milliseconds
    assert num_read > 150


def test_a_thousand_reads_leave_nothing_behind(tmp_path, clip, caplog):
    caplog.set_level(logging.ERROR, "mplug2")  # the records of warnings would be kept until the test ends
    path = tmp_path / "clip.mp4"
    path.write_bytes(make_video(12))
    bad = tmp_path / "bad.mkv"
    bad.write_bytes(damage(make_video(40, container="matroska"), keep=600, share=0.2))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip[:500])

    def read_many(count: int) -> None:
        for _ in range(count):
            read_video(path, num_frames=2)
            read_videos([bad, cut, path], num_frames=2, on_error="skip")

    read_many(50)
    gc.collect()
    files, memory = len(os.listdir("/proc/self/fd")), resident_bytes()
    read_many(250)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files
    assert resident_bytes() - memory < 8 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
