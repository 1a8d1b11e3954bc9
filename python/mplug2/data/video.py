"""Frames of videos by PyAV: the right ones, in one thread, and never more of them held than were asked for."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import av
import numpy as np
import torch
from torch import Tensor

from mplug2.data import sampling as samplers
from mplug2.data.decoding import FrameIndex, RGBConverter, index_frames, pick_frames
from mplug2.data.source import MediaError, Source, open_source
from mplug2.data.transform import Transform

logger = logging.getLogger(__name__)

SAMPLING = ("middle", "first", "random", "interval", "fps")


@dataclass(frozen=True)
class Clip:
    """Frames read from one video.

    frames: uint8 (T, H, W, 3), or (T, size, size, 3) where a transform was given. times: seconds of each from the
    video's first frame. num_skipped: packets that could not be decoded on the way to them. num_total: frames the whole
    video holds.
    """

    frames: Tensor
    times: tuple[float, ...]
    num_skipped: int
    num_total: int


@dataclass(frozen=True)
class ClipBatch:
    """What `read_videos` read: clips[i] comes from sources[indices[i]], errors[j] says why sources[j] cannot be read.

    indices is what annotations must follow: a substituted clip belongs to its own caption, not to that of the file it
    stands for.
    """

    clips: list[Clip]
    indices: list[int]
    errors: dict[int, MediaError] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        return len(self.errors)

    @property
    def num_skipped(self) -> int:
        """Packets that could not be decoded, over all clips."""
        return sum(clip.num_skipped for clip in self.clips)


def read_video(source: str | os.PathLike | bytes | BinaryIO | Tensor, *, num_frames: int | None, **options) -> Tensor:
    """The frames alone of `read_clip`, which names the options: uint8 (T, H, W, 3)."""
    return read_clip(source, num_frames=num_frames, **options).frames


def read_clip(
    source: str | os.PathLike | bytes | BinaryIO | Tensor,
    *,
    num_frames: int | None,
    sampling: str = "middle",
    start: float | None = None,
    end: float | None = None,
    fps: float | None = None,
    interval: int | None = None,
    seed: int | np.random.Generator | None = None,
    transform: Transform | None = None,
) -> Clip:
    """Read frames of a video: RGB, turned upright by the rotation its container asks for.

    source: path, bytes, binary file object, or frames as a tensor, uint8 (T, H, W, 3), which is sampled without times.
    num_frames: how many; with sampling "fps" the most to take, or None. start, end: seconds from the first frame.
    sampling: which frames of [start, end), with num_frames equal intervals in it:
        "middle"    the middle of each interval (released evaluation)
        "first"     the first of each interval
        "random"    one of each interval by `seed`, an int or a numpy Generator (released training)
        "interval"  num_frames frames, `interval` frames apart, from the centre of the clip
        "fps"       the middle of every 1 / `fps` seconds; the middle frame of a clip shorter than that
    A clip with fewer frames repeats its last one. transform: frames are brought to its size as they are decoded, so
    that no more than one full frame is held. Pixels are taken as square.

    MediaError: the file cannot be read, holds no video, or shows nothing between start and end. ValueError: an option
    is wrong.
    """
    choose = _chooser(num_frames, sampling, start, end, fps, interval, seed)
    if isinstance(source, Tensor):
        return _sample_tensor(source, choose, start, end, sampling, transform)
    source = open_source(source)
    try:
        index = index_frames(source)
        chosen = choose(index.times, index.duration)
        if not chosen:
            span = f"from {start or 0} s to {'its end' if end is None else f'{end} s'}"
            raise MediaError(source.name, f"shows no frame {span}: it lasts {index.duration:.2f} s; start before that")
        wanted, repeats = np.unique(chosen, return_inverse=True)
        clip = _collect(source, index, wanted, transform)
    except (av.FFmpegError, OSError) as e:  # OSError: from the caller's file object
        raise MediaError(source.name, f"cannot be decoded ({e.strerror or e}); download or convert it again") from None
    if clip.num_skipped:
        logger.warning("%s: skipped %d packets that could not be decoded", source.name, clip.num_skipped)
    if len(repeats) == len(wanted):
        return clip
    frames, times = clip.frames[torch.from_numpy(repeats)], tuple(clip.times[i] for i in repeats)
    return dataclasses.replace(clip, frames=frames, times=times)


def read_videos(
    sources: Sequence[str | os.PathLike | bytes | BinaryIO], *, on_error: str = "raise", **options
) -> ClipBatch:
    """`read_clip` over several files, with a rule for those that cannot be read.

    on_error: "raise" stops at the first. "skip" leaves it out, so the batch is shorter. "substitute" puts the clip of
    the next readable file in its place; `indices` says which. MediaError if no file at all can be read.
    """
    if on_error not in ("raise", "skip", "substitute"):
        raise ValueError(f"read_videos: on_error must be raise, skip or substitute, got {on_error!r}")
    clips: dict[int, Clip] = {}
    errors: dict[int, MediaError] = {}
    for i, source in enumerate(sources):
        try:
            clips[i] = read_clip(source, **options)
        except MediaError as e:
            if on_error == "raise":
                raise
            logger.warning("%s", e)
            errors[i] = e
    if errors and not clips:
        raise MediaError(f"{len(errors)} files", f"none can be read; the first: {errors[0]}")
    readable = sorted(clips)
    if on_error == "substitute":
        indices = [next((j for j in readable if j >= i), readable[0]) for i in range(len(sources))]
    else:
        indices = readable
    return ClipBatch([clips[i] for i in indices], indices, errors)


# ---- choosing ----

_Choose = Callable[[np.ndarray, float], list[int]]  # times of all frames, duration -> indices of the chosen ones


def _chooser(num_frames, sampling, start, end, fps, interval, seed) -> _Choose:
    if sampling not in SAMPLING:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, got {sampling!r}")
    if (num_frames is None and sampling != "fps") or (num_frames is not None and num_frames < 1):
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    for name, value in (("fps", fps), ("interval", interval)):
        if (sampling == name) != (value is not None):
            raise ValueError(f"{name} goes with sampling={name!r}, got sampling={sampling!r} and {name}={value}")
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if (start is not None and start < 0) or (end is not None and end <= (start or 0)):
        raise ValueError(f"start and end must be seconds with 0 <= start < end, got start={start}, end={end}")

    def choose(times: np.ndarray, duration: float) -> list[int]:
        a, b = samplers.frame_range(times, start, end)
        if a >= b or (start is not None and start >= duration):
            return []
        if sampling == "first":
            return samplers.first_indices(a, b, num_frames)
        if sampling == "random":
            return samplers.random_indices(a, b, num_frames, np.random.default_rng(seed))
        if sampling == "interval":
            return samplers.interval_indices(a, b, num_frames, interval)
        if sampling == "fps":
            until = times[b] if b < len(times) else duration
            indices = samplers.fps_indices(times[a:b] - times[a], until - times[a], fps, num_frames)
            return [a + i for i in indices] or samplers.middle_indices(a, b, 1)
        return samplers.middle_indices(a, b, num_frames)

    return choose


def _sample_tensor(frames: Tensor, choose: _Choose, start, end, sampling, transform) -> Clip:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"a tensor of frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if sampling == "fps" or start is not None or end is not None:
        raise ValueError("a tensor of frames has no times: start, end and sampling='fps' cannot be used with it")
    chosen = choose(np.arange(len(frames)), len(frames))
    frames = frames[torch.tensor(chosen)]
    return Clip(frames if transform is None else transform.resize(frames), tuple(map(float, chosen)), 0, len(frames))


# ---- collecting ----


def _collect(source: Source, index: FrameIndex, wanted: np.ndarray, transform: Transform | None) -> Clip:
    """The clip of the frames at the rising indices `wanted`."""
    convert = RGBConverter()
    frames, times, num_skipped = None, [], 0
    for i, (frame, time, num_skipped) in enumerate(pick_frames(source, index, wanted)):  # noqa: B007
        picture = torch.from_numpy(convert(frame))
        if transform is not None:
            picture = transform.resize(picture[None])[0]
        if frames is None:
            frames = torch.empty((len(wanted), *picture.shape), dtype=torch.uint8)
        elif picture.shape != frames.shape[1:]:
            old, new = (f"{s[0]} x {s[1]}" for s in (frames.shape[1:], picture.shape))
            raise MediaError(source.name, f"changes its size from {old} to {new}; pass a transform")
        frames[i] = picture
        times.append(time)
    if frames is None:
        raise MediaError(source.name, "no frame of it can be decoded; download or convert it again")
    return Clip(frames, tuple(times), num_skipped, len(index.times))
