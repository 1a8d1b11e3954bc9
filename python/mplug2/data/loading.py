"""One source to what the vision encoder takes, whatever it is: picture, video, frames or a ready tensor."""

from __future__ import annotations

import os
from typing import BinaryIO

from torch import Tensor

from mplug2.data.images import is_still, read_image
from mplug2.data.source import open_source
from mplug2.data.transform import Transform
from mplug2.data.video import read_clip


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
    if isinstance(source, Tensor):
        if source.is_floating_point():
            if source.ndim != 5 or source.shape[1] != 3:
                shape = list(source.shape)
                raise ValueError(f"load: a floating-point tensor must be frames [B, 3, T, H, W], got {shape}")
            return source
        frames = read_clip(source, num_frames=num_frames, transform=transform, **options).frames
    else:
        source = open_source(source)
        if is_still(source):
            frames = read_image(source)
        else:
            frames = read_clip(source, num_frames=num_frames, transform=transform, **options).frames
    return transform(frames).unsqueeze(0)
