"""From scripts to frames, whole batches at a time, on the CPU or any device."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from mplug2.data.clothes.pictures import Pictures
from mplug2.data.clothes.scripts import CANVAS, Scripts


def draw(scripts: Scripts, pictures: Pictures, at: np.ndarray, *, size: int = CANVAS, window: np.ndarray | None = None):
    """Draw frames of clips: float32 (B, 3, T, size, size), RGB in 0..1.

    at: (B, T) moments of the path, 0 its start and 1 its end. size: side of the frames in pixels; below CANVAS every
    pixel is the mean of CANVAS / size samples a side. window: (B, 3) left, top and side in canvas pixels of the part of
    the canvas to draw; None: all of it.
    """
    count, num_frames = at.shape
    if window is None:
        window = np.broadcast_to((0.0, 0.0, float(CANVAS)), (count, 3))
    samples = max(1, round(float(window[0, 2]) / size))
    cover, light = _items(scripts, pictures, at, size * samples, window)
    if samples > 1:
        cover, light = F.avg_pool2d(cover, samples), F.avg_pool2d(light, samples)
    cover, light = (x.view(count, 1, num_frames, size, size) for x in (cover, light))
    ground = _grounds(scripts, size, window)[:, :, None]
    tint = torch.from_numpy(scripts.tint.astype(np.float32))[:, :, None, None, None]
    return torch.lerp(ground, ground.new_zeros(()), cover).addcmul_(tint, light)


def _items(scripts, pictures, at, size, window):
    """How much of each pixel the item covers, and how bright it is there: two tensors (B * T, size, size)."""
    state = scripts.path[:, :1] + (scripts.path[:, 1:] - scripts.path[:, :1]) * at[:, :, None]
    x, y, side, angle = np.moveaxis(state, -1, 0)
    # Affine map from output coordinates in -1..1 to picture coordinates in -1..1: shift, rotate, scale, mirror.
    left, top, span = (window[:, i, None] for i in range(3))
    cos, sin, flip = np.cos(angle) / side, np.sin(angle) / side, np.where(scripts.mirrored, -1.0, 1.0)[:, None]
    dx, dy = 2 * (left - x) + span, 2 * (top - y) + span
    across = flip * cos * span, flip * sin * span, flip * (cos * dx + sin * dy)
    theta = np.stack((*across, -sin * span, cos * span, cos * dy - sin * dx), -1)
    theta = torch.from_numpy(theta.astype(np.float32)).view(-1, 2, 3)
    grey = torch.from_numpy(pictures.pixels[scripts.picture]).float().div_(255)
    cover = (grey * 8).clamp_(max=1)
    picture = torch.stack((cover, cover * (0.25 + 0.75 * grey)), 1).repeat_interleave(at.shape[1], 0)
    grid = F.affine_grid(theta, (len(theta), 2, size, size), align_corners=False)
    drawn = F.grid_sample(picture, grid, align_corners=False)
    return drawn[:, 0], drawn[:, 1]


def _grounds(scripts, size, window):
    """Backgrounds (B, 3, size, size), the same in every frame."""
    left, top, span = window.T
    zero = np.zeros_like(span)
    theta = np.stack((span, zero, 2 * left + span - CANVAS, zero, span, 2 * top + span - CANVAS), -1) / CANVAS
    theta = torch.from_numpy(theta.astype(np.float32)).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(theta), 3, size, size), align_corners=False)
    ground = torch.from_numpy(scripts.ground.astype(np.float32))
    return F.grid_sample(ground, grid, padding_mode="border", align_corners=False)
