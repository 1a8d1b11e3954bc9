"""The vision block as the published code is built, and the same block with tokens left in place, both in plain PyTorch.

Published structure: tokens (L, B*T, D); every local temporal module copies the patches to (B, D, T, H, W), normalises
channels last, runs three Conv3d and copies back; attention is nn.MultiheadAttention. Parameters have the names of
`mplug2.modules.vision.VisionBlock`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug2.modules.vision import LocalTemporal, VisionBlock


class PublishedLocalTemporal(nn.Module):
    def __init__(self, module: LocalTemporal):
        super().__init__()
        width = module.norm.normalized_shape[0]
        self.norm = module.norm
        self.down = nn.Conv3d(width, width // 2, 1)
        self.conv = nn.Conv3d(width // 2, width // 2, (3, 1, 1), padding=(1, 0, 0), groups=width // 2)
        self.up = nn.Conv3d(width // 2, width, 1)
        for conv, source in ((self.down, module.down), (self.conv, module.conv), (self.up, module.up)):
            conv.to(source.weight)
            conv.weight.data.copy_(source.weight.reshape(conv.weight.shape))
            conv.bias.data.copy_(source.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, T, H, W)
        normed = self.norm(x.permute(0, 2, 3, 4, 1).contiguous()).permute(0, 4, 1, 2, 3).contiguous()
        hidden = self.conv(self.down(normed))
        return x + self.up(hidden * torch.sigmoid(1.702 * hidden))


class PublishedBlock(nn.Module):
    def __init__(self, block: VisionBlock, num_heads: int):
        super().__init__()
        attention, mlp = block.attention, block.mlp
        width = attention.norm.normalized_shape[0]
        self.temporal = nn.ModuleList(map(PublishedLocalTemporal, (block.local_temporal1, block.local_temporal2)))
        self.norm1, self.norm2 = attention.norm, mlp.norm
        self.attention = nn.MultiheadAttention(width, num_heads).to(attention.qkv.weight)
        self.attention.in_proj_weight.data.copy_(attention.qkv.weight)
        self.attention.in_proj_bias.data.copy_(attention.qkv.bias)
        self.attention.out_proj.weight.data.copy_(attention.out.weight)
        self.attention.out_proj.bias.data.copy_(attention.out.bias)
        self.up, self.down = mlp.up, mlp.down

    def mix_time(self, module: PublishedLocalTemporal, x: Tensor, frames: int) -> Tensor:
        tokens, batch, width = x.shape[0] - 1, x.shape[1] // frames, x.shape[2]
        side = int(tokens**0.5)
        patches = x[1:].view(side, side, batch, frames, width).permute(2, 4, 3, 0, 1).contiguous()
        patches = module(patches).permute(3, 4, 0, 2, 1).reshape(tokens, batch * frames, width)
        return torch.cat([x[:1], patches])

    def forward(self, x: Tensor, frames: int) -> Tensor:  # (L, B*T, D)
        x = self.mix_time(self.temporal[0], x, frames)
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        x = self.mix_time(self.temporal[1], x, frames)
        hidden = F.linear(self.norm2(x), self.up.weight, self.up.bias)
        return x + F.linear(hidden * torch.sigmoid(1.702 * hidden), self.down.weight, self.down.bias)


def token_layout_local_temporal(x: Tensor, module: LocalTemporal) -> Tensor:
    """x (B, T, L, D): the same arithmetic without a change of layout."""
    tokens = x[:, :, 1:]
    hidden = module.down(module.norm(tokens))
    padded = F.pad(hidden, (0, 0, 0, 0, 1, 1))
    taps = module.conv.weight[:, 0]
    frames = x.shape[1]
    mixed = sum(padded[:, k : k + frames] * taps[:, k] for k in range(3)) + module.conv.bias
    return torch.cat([x[:, :, :1], tokens + module.up(mixed * torch.sigmoid(1.702 * mixed))], dim=2)


def token_layout_block(x: Tensor, block: VisionBlock, num_heads: int) -> Tensor:
    """x (B, T, L, D)."""
    attention, mlp = block.attention, block.mlp
    x = token_layout_local_temporal(x, block.local_temporal1)
    qkv = F.linear(attention.norm(x), attention.qkv.weight, attention.qkv.bias)
    q, k, v = qkv.flatten(0, 1).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view(x.shape)
    x = x + F.linear(mixed, attention.out.weight, attention.out.bias)
    x = token_layout_local_temporal(x, block.local_temporal2)
    hidden = F.linear(mlp.norm(x), mlp.up.weight, mlp.up.bias)
    return x + F.linear(hidden * torch.sigmoid(1.702 * hidden), mlp.down.weight, mlp.down.bias)
