"""The whole vision block, forward, against its matrix products alone, the published structure and the token layout."""

import bench
import reference_structure
import torch
import torch.nn.functional as F
from torch import nn

from mplug2.config import PRESETS
from mplug2.modules.vision import VisionBlock


def main() -> None:
    args = bench.arguments(__doc__, preset="large", batch=1, frames=16)
    config = PRESETS[args.preset].vision
    bench.start()
    for dtype in args.dtype:
        torch.manual_seed(0)
        block = VisionBlock(config)
        for p in block.parameters():
            nn.init.normal_(p, std=0.03)
        block = block.to(bench.DTYPES[dtype]).eval()
        published = reference_structure.PublishedBlock(block, config.num_heads).eval()
        x = torch.randn(args.batch, args.frames, config.tokens_per_frame, config.width).to(bench.DTYPES[dtype])
        tokens_first = x.flatten(0, 1).transpose(0, 1).contiguous()
        wide = torch.randn(*x.shape[:3], config.mlp_width).to(x.dtype)
        half = torch.randn(*x.shape[:3], config.width // 2).to(x.dtype)
        temporal = [m for m in (block.local_temporal1, block.local_temporal2) if not isinstance(m, nn.Identity)]

        def products(block=block, temporal=temporal, x=x, half=half, wide=wide):
            for module in temporal:
                F.linear(x, module.down.weight, module.down.bias)
                F.linear(half, module.up.weight, module.up.bias)
            for layer, given in (
                (block.attention.qkv, x),
                (block.attention.out, x),
                (block.mlp.up, x),
                (block.mlp.down, wide),
            ):
                F.linear(given, layer.weight, layer.bias)

        def as_published(published=published, x=tokens_first, frames=args.frames):
            return published(x, frames)

        def in_place(block=block, x=x, heads=config.num_heads):
            return reference_structure.token_layout_block(x, block, heads)

        with torch.no_grad():
            expected = in_place()
            ours = block(x)
            torch.testing.assert_close(
                as_published().transpose(0, 1).unflatten(0, x.shape[:2]), expected, rtol=0.1, atol=0.1
            )
            torch.testing.assert_close(ours, expected, rtol=0.1, atol=0.1)
            candidates = {
                "ours": lambda block=block, x=x: block(x),
                "GEMMs alone": products,
                "published structure eager": as_published,
                "token layout eager": in_place,
                **bench.compiled(as_published, args, "published structure compiled"),
                **bench.compiled(in_place, args, "token layout compiled"),
            }
            timings = bench.measure(candidates, args.rounds)
        shape = f"B={args.batch} T={args.frames} L={config.tokens_per_frame} D={config.width} N={config.num_heads}"
        bench.report("vision_block forward", dtype, shape, timings)
    bench.finish()


if __name__ == "__main__":
    main()
