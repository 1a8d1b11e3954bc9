"""Videos that are as they should be: the frames asked for, from every container, bit for bit those of a full decode."""

import io
import weakref

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition

from make_clips import make_video, number_of, numbered_frame
from mplug2.data import MediaError, Transform, load, read_clip, read_video
from mplug2.data.decoding import RGBConverter
from mplug2.data.sampling import middle_indices

FORMATS = {
    "mp4": {},
    "mp4, keyframes only": {"keyframes": 1, "b_frames": 0},
    "mp4, one keyframe": {"keyframes": 250},
    "mp4, many B-frames": {"keyframes": 20, "b_frames": 6, "options": {"x264-params": "b-pyramid=normal:b-adapt=0"}},
    "mp4, open groups": {"keyframes": 7, "options": {"x264-params": "open-gop=1:b-adapt=0"}},
    "mkv": {"container": "matroska"},
    "ts": {"container": "mpegts"},
    "ts, late start": {"container": "mpegts", "start_time": 5.0},
    "flv": {"container": "flv"},
    "avi, h264 without times": {"container": "avi"},
    "avi, mpeg4": {"container": "avi", "codec": "mpeg4"},
    "avi, mpeg4 with B-frames": {"container": "avi", "codec": "mpeg4", "options": {"bf": "2"}},
    "raw h264": {"container": "h264"},
    "hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "webm, vp8": {"container": "webm", "codec": "libvpx"},
    "webm, vp9": {"container": "webm", "codec": "libvpx-vp9"},
    "mpeg2": {"container": "mpeg", "codec": "mpeg2video"},
    "wmv": {"container": "asf", "codec": "wmv2"},
    "gif": {"container": "gif", "codec": "gif", "pix_fmt": "rgb8"},
    "y4m": {"container": "yuv4mpegpipe", "codec": "rawvideo"},
    "10 bits": {"pix_fmt": "yuv420p10le"},
    "odd size": {"codec": "mpeg4", "height": 65, "width": 97},
    "odd size, 4:4:4": {"pix_fmt": "yuv444p", "height": 65, "width": 97},
}


def numbers(frames: torch.Tensor) -> list[int]:
    return [number_of(frame) for frame in frames]


def all_frames(content: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def clip() -> bytes:
    return make_video(60)


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_those_of_a_full_decode(name):
    content = make_video(60, **FORMATS[name])
    decoded = all_frames(content)
    assert numbers(decoded) == list(range(60))
    for num_frames in (1, 5, 16, 60):
        result = read_clip(content, num_frames=num_frames)
        expected = middle_indices(0, 60, num_frames)
        assert result.frames.dtype == torch.uint8
        assert numbers(result.frames) == expected
        assert all(np.array_equal(f, decoded[i]) for f, i in zip(result.frames, expected, strict=True))
        assert result.times == pytest.approx([i / 25 for i in expected], abs=2e-3)
        assert (result.num_skipped, result.num_total) == (0, 60)


def test_av1_where_its_encoder_is_at_hand():
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this FFmpeg has no AV1 encoder")
    content = make_video(40, codec="libsvtav1")
    assert numbers(read_video(content, num_frames=8)) == middle_indices(0, 40, 8)


def test_every_kind_of_source_gives_the_same_frames(clip, tmp_path):
    path = tmp_path / "clip.png"  # the name is not looked at
    path.write_bytes(clip)
    expected = read_video(clip, num_frames=4)
    assert numbers(expected) == [7, 22, 37, 52]
    with path.open("rb") as file:
        file.seek(100)  # file objects are read from their beginning
        sources = [path, str(path), bytearray(clip), io.BytesIO(clip), io.BufferedReader(io.BytesIO(clip)), file]
        for source in sources:
            assert torch.equal(read_video(source, num_frames=4), expected)
        assert torch.equal(read_video(file, num_frames=4), expected)
        assert not file.closed


def test_a_file_object_that_cannot_seek_is_read_whole(clip):
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *args) -> int:
            raise OSError("not seekable")

    assert numbers(read_video(Pipe(clip), num_frames=4)) == [7, 22, 37, 52]


def test_a_tensor_of_frames_is_sampled_like_a_video():
    frames = torch.from_numpy(np.stack([numbered_frame(i) for i in range(9)]))
    assert numbers(read_video(frames, num_frames=4)) == middle_indices(0, 9, 4)
    assert read_video(frames, num_frames=2, transform=Transform(32)).shape == (2, 32, 32, 3)
    with pytest.raises(ValueError, match="has no times"):
        read_video(frames, num_frames=4, start=1.0)
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\], got torch.float32"):
        read_video(frames.float(), num_frames=4)


def test_start_and_end(clip):
    for start, end, first, last in (
        (None, None, 0, 60),
        (0.0, None, 0, 60),
        (1.0, None, 25, 60),
        (1.0, 2.0, 25, 50),
        (0.02, 0.04, 0, 1),
        (2.3, 99.0, 57, 60),
    ):
        frames = read_video(clip, num_frames=5, start=start, end=end)
        assert numbers(frames) == middle_indices(first, last, 5), (start, end)
    with pytest.raises(MediaError, match=r"shows no frame from 2\.4 s to its end: it lasts 2\.40 s"):
        read_video(clip, num_frames=5, start=2.4)
    with pytest.raises(ValueError, match="0 <= start < end"):
        read_video(clip, num_frames=5, start=2.0, end=1.0)


def test_every_sampling(clip):
    assert numbers(read_video(clip, num_frames=4, sampling="first")) == [0, 15, 30, 45]
    assert numbers(read_video(clip, num_frames=3, sampling="interval", interval=5)) == [24, 29, 34]
    assert numbers(read_video(clip, num_frames=None, sampling="fps", fps=2)) == [6, 19, 31, 44, 56]
    assert numbers(read_video(clip, num_frames=2, sampling="fps", fps=2)) == [6, 19]
    assert numbers(read_video(clip, num_frames=None, sampling="fps", fps=0.1)) == [29]
    assert numbers(read_video(clip, num_frames=None, sampling="fps", fps=4, start=1.0, end=2.0)) == [28, 34, 41, 47]


def test_random_sampling_is_a_seeds(clip):
    drawn = [numbers(read_video(clip, num_frames=4, sampling="random", seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(15 * i <= number < 15 * i + 14 for frames in drawn for i, number in enumerate(frames))
    rng = np.random.default_rng(1)
    going_on = [numbers(read_video(clip, num_frames=4, sampling="random", seed=rng)) for _ in range(2)]
    assert going_on[0] == drawn[0] != going_on[1]


def test_wrong_options_are_said_before_anything_is_read():
    for options, message in (
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"num_frames": None}, "num_frames must be at least 1, got None"),
        ({"num_frames": 4, "sampling": "last"}, "sampling must be one of middle, first, random, interval, fps"),
        ({"num_frames": 4, "fps": 2}, "fps goes with sampling='fps'"),
        ({"num_frames": 4, "sampling": "interval"}, "interval goes with sampling='interval'"),
        ({"num_frames": 4, "sampling": "interval", "interval": 0}, "interval must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_video("/nowhere.mp4", **options)
    with pytest.raises(TypeError, match="path, bytes or a binary file object, got int"):
        read_video(3, num_frames=4)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_frame_rate_goes_by_time(container):
    gaps = np.random.default_rng(0).integers(10, 200, 60)
    times = ((np.cumsum(gaps) - gaps[0]) / 1000).tolist()
    content = make_video(60, container=container, times=times)
    assert numbers(read_video(content, num_frames=16)) == middle_indices(0, 60, 16)
    result = read_clip(content, num_frames=None, sampling="fps", fps=4)
    seconds = np.arange(0.125, times[-1], 0.25)
    expected = np.abs(np.subtract.outer(seconds, times)).argmin(1).tolist()
    assert numbers(result.frames)[: len(expected)] == expected
    assert result.times == pytest.approx([times[i] for i in numbers(result.frames)], abs=2e-3)
    inside = [i for i, t in enumerate(times) if 1.0 <= t < 2.0]
    found = numbers(read_video(content, num_frames=len(inside) + 1, start=1.0, end=2.0))
    assert found == [inside[0] - 1, *inside]  # the frame before is on screen at 1.0 s


@pytest.mark.parametrize(("turn", "matrix"), [(1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1)), (3, (0, 1, -1, 0))])
def test_rotation_is_applied(clip, turn, matrix):
    """matrix: a, b, c, d of the track header: a shown point is (a x + c y, b x + d y), with y downwards."""
    upright = read_video(clip, num_frames=2)
    at = clip.index(b"tkhd") + 4 + 40  # version and flags, times, identifier, duration, layer, group, volume
    values = np.array([matrix[0], matrix[1], 0, matrix[2], matrix[3]], ">i4") * np.int32(65536)
    turned = clip[:at] + values.astype(">i4").tobytes() + clip[at + 20 :]
    frames = read_video(turned, num_frames=2)
    assert torch.equal(frames, torch.rot90(upright, turn, (1, 2)))
    small = read_video(turned, num_frames=2, transform=Transform(32))
    assert torch.equal(small, Transform(32).resize(frames))


def test_one_frame_and_fewer_than_asked_for():
    assert numbers(read_video(make_video(1), num_frames=4)) == [0, 0, 0, 0]
    result = read_clip(make_video(3), num_frames=5)
    assert numbers(result.frames) == [0, 1, 2, 2, 2]
    assert result.times == pytest.approx([0, 0.04, 0.08, 0.08, 0.08])


@pytest.mark.parametrize("resize", ["nearest", "area"])
def test_frames_resized_on_the_way_equal_those_resized_after(clip, resize):
    transform = Transform(48, resize)
    frames = read_video(clip, num_frames=6)
    assert torch.equal(read_video(clip, num_frames=6, transform=transform), transform.resize(frames))
    assert torch.equal(load(clip, transform, num_frames=6), transform(frames)[None])


def test_no_more_than_one_full_frame_is_held(clip, monkeypatch):
    pictures, alive = [], []

    class Counting(RGBConverter):
        def __call__(self, frame):
            picture = super().__call__(frame)
            pictures.append(weakref.ref(picture))
            alive.append(sum(ref() is not None for ref in pictures))
            return picture

    monkeypatch.setattr("mplug2.data.video.RGBConverter", Counting)
    read_video(clip, num_frames=16, transform=Transform(32))
    assert alive == [1] * 16


def test_a_change_of_size_needs_a_transform():
    content = make_video(10, container="h264") + make_video(10, container="h264", height=32, width=48)
    with pytest.raises(MediaError, match="changes its size from 64 x 96 to 32 x 48; pass a transform"):
        read_video(content, num_frames=20)
    frames = read_video(content, num_frames=20, transform=Transform(60))
    assert numbers(frames) == [*range(10), *range(10)]


def with_cover(num_frames: int) -> bytes:
    """A piece of music with a cover, and a video of num_frames frames unless that is 0."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.disposition = Disposition.attached_pic
        cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
        sound = out.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        samples.rate = 8000
        encoded = [(cover, av.VideoFrame.from_ndarray(numbered_frame(999), format="rgb24")), (sound, samples)]
        if num_frames:
            video = out.add_stream("mpeg4", rate=25)
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            frames = [av.VideoFrame.from_ndarray(numbered_frame(i), format="rgb24") for i in range(num_frames)]
            encoded += [(video, frame) for frame in frames]
        for stream, frame in encoded:
            out.mux(stream.encode(frame))
        for stream in dict.fromkeys(stream for stream, _ in encoded):
            out.mux(stream.encode(None))
    return file.getvalue()


def test_a_cover_is_not_the_video():
    assert numbers(read_video(with_cover(5), num_frames=5)) == [0, 1, 2, 3, 4]
    with pytest.raises(MediaError, match="holds no video, only audio, cover streams"):
        read_video(with_cover(0), num_frames=1)


def test_titles_in_another_encoding_are_no_error():
    file = io.BytesIO()
    with av.open(file, "w", format="avi", metadata_encoding="latin-1") as out:
        out.metadata["title"] = "caf\xe9"
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(3), format="rgb24")))
        out.mux(stream.encode(None))
    assert numbers(read_video(file, num_frames=1)) == [3]
