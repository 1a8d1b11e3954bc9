"""Sources to what the vision encoder takes, whatever they are: picture, video, frames or a ready tensor."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import BinaryIO, TypeVar

from torch import Tensor

from mplug2._errors_last import ErrorsLast
from mplug2.data.images import is_still, read_image
from mplug2.data.source import open_source
from mplug2.data.transform import Transform
from mplug2.data.video import read_clip

Item, Result = TypeVar("Item"), TypeVar("Result")


def load(
    source: str | os.PathLike | bytes | BinaryIO | Tensor,
    transform: Transform,
    *,
    num_frames: int,
    **options,
) -> Tensor:
    """Read and transform one source: float32 (1, 3, T, size, size). A file's content decides what it is, not its name.

    source: a picture (T = 1), a video or an animated GIF (num_frames frames; `options` as in `read_clip`); frames as a
    tensor, uint8 (T, H, W, 3), sampled likewise; or a floating-point tensor (B, 3, T, H, W), which is returned as it
    is.
    """
    if isinstance(source, Tensor) and source.is_floating_point():
        if source.ndim != 5 or source.shape[1] != 3:
            shape = list(source.shape)
            raise ValueError(f"load: a floating-point tensor must be frames [B, 3, T, H, W], got {shape}")
        return source
    frames = load_frames(source, transform, num_frames=num_frames, **options)
    return transform.normalize(frames).unsqueeze(0)


def load_frames(
    source: str | os.PathLike | bytes | BinaryIO | Tensor, transform: Transform, *, num_frames: int, **options
) -> Tensor:
    """As `load`, before the scale is changed: uint8 (T, size, size, 3), a quarter of the bytes."""
    if not isinstance(source, Tensor):
        source = open_source(source)
        if is_still(source):
            return transform.resize(read_image(source))
    return transform.resize(read_clip(source, num_frames=num_frames, transform=transform, **options).frames)


def read_ahead(
    read: Callable[[Item], Result], sources: Iterable[Item], *, num_threads: int = 2, ahead: int = 16
) -> Iterator[Result]:
    """`read` of every source, in order; threads read up to `ahead` sources before they are asked for.

    Paths and bytes are read in the threads; anything else, such as a file that its owner may close or move on, before
    the next source is taken. An error, of a source or of `sources`, is raised in its turn.
    """
    pool = ThreadPoolExecutor(num_threads)
    waiting: deque[Future[Result]] = deque()
    taken = ErrorsLast(sources)
    try:
        for source in taken:
            waiting.append(pool.submit(read, source))
            if not isinstance(source, (str, os.PathLike, bytes)):
                wait([waiting[-1]])
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        taken.finish()
    finally:
        pool.shutdown(cancel_futures=True)


def equal_batches(
    items: Iterable[Item], batch_size: int, shape: Callable[[Item], Hashable]
) -> Iterator[list[tuple[int, Item]]]:
    """Batches of up to batch_size (number, item) whose `shape` is equal; numbers count the items from 0.

    Items of one shape keep their order, those of several overtake each other; none waits for more than 4 batches of
    others. An error of `items` is raised behind the last batch.
    """
    taken = ErrorsLast(items)
    groups: dict[Hashable, list[tuple[int, Item]]] = {}
    for number, item in enumerate(taken):
        kind = shape(item)
        groups.setdefault(kind, []).append((number, item))
        if len(groups[kind]) == batch_size:
            yield groups.pop(kind)
        for late in [kind for kind, group in groups.items() if number - group[0][0] >= 4 * batch_size]:
            yield groups.pop(late)
    yield from groups.values()
    taken.finish()
