"""Which frames of a clip are read. Pure index arithmetic, as the released code samples; no file is touched here.

A clip is the range of frames [begin, end). Functions return a list of frame indices in rising order; where the clip has
fewer frames than asked for, the last one is repeated, so that every method but `fps_indices` returns exactly
`num_frames`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


def middle_indices(begin: int, end: int, num_frames: int) -> list[int]:
    """The middle frame, (a + b - 1) // 2, of each of num_frames equal intervals [a, b): the released test sampling."""
    return _pad([(a + b - 1) // 2 for a, b in _intervals(begin, end, num_frames)], num_frames)


def first_indices(begin: int, end: int, num_frames: int, *, offset: int = 0) -> list[int]:
    """The first frame of each interval plus `offset`, which never leaves the clip (in the released code it does)."""
    return _pad([min(a + offset, end - 1) for a, _ in _intervals(begin, end, num_frames)], num_frames)


def random_indices(begin: int, end: int, num_frames: int, rng: Any, *, half_open: bool = True) -> list[int]:
    """One random frame of each interval [a, b): the released training sampling.

    rng: a seeded generator with `choice` and `permutation`, such as `numpy.random.default_rng(seed)`.

    half_open: as the released code draws, from [a, b - 1), so that the last frame of an interval is never drawn; and
    when any interval holds a single frame, a sorted random subset of all frames instead. False draws from [a, b) and
    has no such case.
    """
    intervals = _intervals(begin, end, num_frames)
    if half_open and any(b - a == 1 for a, b in intervals):
        subset = rng.permutation(end - begin)[: len(intervals)]
        return _pad(sorted(begin + int(i) for i in subset), num_frames)
    return _pad([int(rng.choice(range(a, b - half_open))) for a, b in intervals], num_frames)


def interval_indices(begin: int, end: int, num_frames: int, interval: int) -> list[int]:
    """num_frames frames, `interval` frames apart, from the centre of the clip; from its beginning if too short."""
    first = begin + max(0, (end - begin - 1 - (num_frames - 1) * interval) // 2)
    return [min(first + i * interval, end - 1) for i in range(num_frames)]


def fps_indices(times: Sequence[float], duration: float, fps: float, max_frames: int | None = None) -> list[int]:
    """The frames nearest to the times (k + 1/2) / fps, k = 0, 1, ...: the middle of each 1/fps seconds.

    times: seconds of every frame from the start of the clip, rising. duration: seconds. A clip shorter than half a
    period has no such time and gives no frame. max_frames keeps the first ones only.
    """
    times = np.asarray(times, dtype=np.float64)
    count = int(np.ceil(duration * fps))
    targets = (0.5 + np.arange(count if max_frames is None else min(count, max_frames))) / fps
    # A time is used while the frame nearest to it exists: the one after the last would be shown at `duration`.
    edges = np.append(times, duration)
    after = np.clip(np.searchsorted(edges, targets), 1, len(edges) - 1)
    # Half a microsecond of slack: a tie goes to the earlier frame whatever the rounding.
    nearest = np.where(targets - edges[after - 1] <= edges[after] - targets + 1e-6, after - 1, after)
    return nearest[nearest < len(times)].tolist()


def frame_range(times: Sequence[float], start: float | None, end: float | None) -> tuple[int, int]:
    """The frames [begin, end) on screen between two times, in seconds from the first; None is the clip's own limit.

    begin: the frame shown at `start` (a start of 0.0 counts: the released code ignores it). end: the first frame that
    appears at or after `end`. Empty when nothing is shown between them.
    """
    times = np.asarray(times, dtype=np.float64)
    slack = 1e-6  # seconds: a frame at 11/25 s is shown at 0.44 s whatever the rounding of either
    first = 0 if start is None else max(0, int(np.searchsorted(times, start + slack)) - 1)
    last = len(times) if end is None else int(np.searchsorted(times, end - slack))
    return first, last


def _intervals(begin: int, end: int, num_frames: int) -> list[tuple[int, int]]:
    count = min(num_frames, end - begin)
    edges = np.linspace(begin, end, count + 1).astype(int).tolist()
    return list(itertools.pairwise(edges))


def _pad(indices: list[int], num_frames: int) -> list[int]:
    return indices + indices[-1:] * (num_frames - len(indices))
