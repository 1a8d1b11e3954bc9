"""Dual-vision encoder: one ViT for images and videos, with local temporal modeling inside every block.

    block: local temporal -> x + attention(LN(x)) within a frame -> local temporal -> x + mlp(LN(x))

Tokens stay (B, T, L, D) from the first block to the last; an image is a video of one frame (mPLUG-2, figure 2b).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2 import ops
from mplug2.config import VisionConfig
from mplug2.modules.layers import Block, Linear


class LocalTemporal(nn.Module):
    """x + up(quick_gelu(conv3(down(LN(x))))) over time on every patch; class tokens pass through. x (B, T, L, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, width // 2)
        self.conv = nn.Conv1d(width // 2, width // 2, 3, padding=1, groups=width // 2)
        self.up = nn.Linear(width // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        return ops.local_temporal(
            x, self.norm.weight, self.norm.bias, self.down.weight, self.down.bias,
            self.conv.weight.squeeze(1), self.conv.bias, self.up.weight, self.up.bias, eps=self.norm.eps,
        )  # fmt: skip


class FrameAttention(nn.Module):
    """x + out(attention(LN(x))) among the tokens of one frame, from one packed projection. x (B, T, L, D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(0, 1).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.out(ops.attention(q, k, v).flatten(2).view(x.shape), residual=x)


class VisionMlp(nn.Module):
    """x + down(quick_gelu(up(LN(x))))."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = Linear(width, mlp_width)
        self.down = Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x), activation="quick_gelu"), residual=x)


class VisionBlock(Block):
    """One block. The released code has two local temporal modules per block, the paper's figure one."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        count = config.num_local_temporal
        self.local_temporal1 = LocalTemporal(config.width) if count >= 1 else nn.Identity()
        self.attention = FrameAttention(config.width, config.num_heads)
        self.local_temporal2 = LocalTemporal(config.width) if count >= 2 else nn.Identity()
        self.mlp = VisionMlp(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_temporal1(x)
        x = self.attention(x)
        x = self.local_temporal2(x)
        return self.mlp(x)


class VisionEncoder(nn.Module):
    """Video (B, 3, T, H, W) -> tokens (B, 1 + T * grid^2, D): the class token averaged over frames, then the patches
    frame by frame. Where `output_width` differs from the encoder's, a linear map and a LayerNorm follow."""

    def __init__(self, config: VisionConfig, *, output_width: int | None = None):
        super().__init__()
        self.config = config
        stride = config.patch_stride or config.patch_size
        depth, step = (1, 1) if config.temporal_stride is None else (3, config.temporal_stride)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(config.tokens_per_frame, config.width))
        self.patch_embedding = nn.Conv3d(
            3, config.width, (depth, config.patch_size, config.patch_size), stride=(step, stride, stride),
            padding=(depth // 2, (config.patch_size - stride) // 2, (config.patch_size - stride) // 2), bias=False,
        )  # fmt: skip
        self.norm_pre = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.norm_post = nn.LayerNorm(config.width)
        self.projection = None
        if output_width not in (None, config.width):
            self.projection = Linear(config.width, output_width)
            self.projection_norm = nn.LayerNorm(output_width, eps=1e-12)

    def embed(self, video: Tensor) -> Tensor:
        """Patches and class tokens with their positions: (B, 3, T, H, W) -> (B, T, L, D)."""
        size = self.config.image_size
        if video.dim() != 5 or video.shape[1] != 3 or tuple(video.shape[3:]) != (size, size):
            raise ValueError(f"vision: video must have shape (B, 3, T, {size}, {size}), got {tuple(video.shape)}")
        patches = self.patch_embedding(video).flatten(3).permute(0, 2, 3, 1)
        cls = self.class_embedding.expand(*patches.shape[:2], 1, -1)
        return self.norm_pre(torch.cat([cls, patches], 2) + self.position_embedding)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens of all frames in one row: (B, T, L, D) -> (B, 1 + T * (L - 1), D)."""
        tokens = self.norm_post(torch.cat([x[:, :, :1].mean(1), x[:, :, 1:].flatten(1, 2)], 1))
        return tokens if self.projection is None else self.projection_norm(self.projection(tokens))

    def forward(self, video: Tensor) -> Tensor:
        x = self.embed(video)
        for block in self.blocks:
            x = block(x)
        return self.pool(x)
