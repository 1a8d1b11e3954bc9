"""From decoded frames to what the vision encoder takes: resize to a square (aspect ratio not kept), scale, normalise.

"nearest" is how the released weights are evaluated; "area" is the average of the source pixels each output pixel
covers. Both give uint8 and are exact: nearest is a choice of pixels, area is integer arithmetic with one rounding. So a
frame resized while a video is read equals the same frame resized later, bit for bit. The work is done by the compiled
module `_frames`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mplug2 import _frames

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESIZE_MODES = ("nearest", "area")


class Transform:
    """uint8 frames (T, H, W, 3) -> float32 (3, T, size, size), (resized / 255 - mean) / std per channel.

    image_size: side of the square in pixels. resize: "nearest" (source pixel floor(i * in / out), with the quotient in
    float32, as torch rounds it) or "area". mean, std: of the channels R, G, B on the scale 0..1; the defaults are
    CLIP's.
    """

    def __init__(
        self,
        image_size: int,
        resize: str = "nearest",
        *,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"Transform: image_size must be a positive number of pixels, got {image_size}")
        if resize not in RESIZE_MODES:
            raise ValueError(f"Transform: resize must be one of {', '.join(RESIZE_MODES)}, got {resize!r}")
        self.image_size = image_size
        self.resize_mode = resize
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __repr__(self) -> str:
        return f"Transform({self.image_size}, {self.resize_mode!r}, mean={self.mean}, std={self.std})"

    def __call__(self, frames: Tensor | np.ndarray) -> Tensor:
        return self.normalize(self.resize(frames))

    def resize(self, frames: Tensor | np.ndarray) -> Tensor:
        """uint8 (T, H, W, 3) -> uint8 (T, size, size, 3). Frames of that size already are returned as they are."""
        frames = torch.as_tensor(frames)
        _check(frames)
        size = self.image_size
        if frames.shape[1:3] == (size, size):
            return frames
        if 0 in frames.shape[1:3]:
            raise ValueError(f"Transform: frames must hold at least one pixel, got shape {list(frames.shape)}")
        out = torch.empty((len(frames), size, size, 3), dtype=torch.uint8)
        source = frames.cpu().contiguous().numpy()
        for picture, target in zip(source, out.numpy(), strict=True):
            _frames.resize(picture, target, self.resize_mode)
        return out.to(frames.device)

    def normalize(self, frames: Tensor | np.ndarray) -> Tensor:
        """uint8 (T, H, W, 3) -> float32 (3, T, H, W)."""
        frames = torch.as_tensor(frames)
        _check(frames)
        mean, std = (frames.new_tensor(v, dtype=torch.float32).view(3, 1, 1, 1) for v in (self.mean, self.std))
        return (frames.permute(3, 0, 1, 2).contiguous().float().div_(255) - mean).div_(std)


def resized_crop(frames: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """Cut box = (top, left, height, width) out of uint8 frames (T, H, W, 3) and resize it to int64 (T, size, size, 3).

    Bicubic without antialias, truncated towards zero and not clamped, so values leave 0..255: the crop that the
    released weights were trained on.
    """
    frames = torch.as_tensor(frames)
    _check(frames)
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1 or top + height > frames.shape[1] or left + width > frames.shape[2]:
        size = f"{frames.shape[1]} x {frames.shape[2]}"
        raise ValueError(f"resized_crop: box (top, left, height, width) = {box} leaves frames of {size}")
    region = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
    resized = F.interpolate(region, size=(size, size), mode="bicubic", align_corners=False)
    return resized.long().permute(0, 2, 3, 1)


def _check(frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"Transform: frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}; "
            "permute channels to the end and scale to 0..255"
        )
