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
    with bench.our_layer() as layer:
        run(args, config, layer)
    bench.finish()


def run(args, config, layer: str) -> None:
    for dtype in args.dtype:
        torch.manual_seed(0)
        block = VisionBlock(config)
        for p in block.parameters():
            nn.init.normal_(p, std=0.03)
        block = block.to(args.device, bench.DTYPES[dtype]).eval()
        published = reference_structure.PublishedBlock(block, config.num_heads).to(args.device).eval()
        x = torch.randn(args.batch, args.frames, config.tokens_per_frame, config.width).to(
            args.device, bench.DTYPES[dtype]
        )
        tokens_first = x.flatten(0, 1).transpose(0, 1).contiguous()
        wide = torch.randn(*x.shape[:3], config.mlp_width).to(x)
        half = torch.randn(*x.shape[:3], config.width // 2).to(x)
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
            timings = bench.measure(bench.present(candidates), args.rounds)
        shape = f"B={args.batch} T={args.frames} L={config.tokens_per_frame} D={config.width} N={config.num_heads}"
        bench.report("vision_block forward", dtype, shape, timings, gflop=gflop(block, x, config), layer=layer)


def gflop(block, x, config) -> float:
    """Of the products of every token with every weight, and of attention among the tokens of a frame."""
    weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    tokens = x.numel() // config.width
    return 2e-9 * tokens * weights + 4e-9 * tokens * config.tokens_per_frame * config.width


if __name__ == "__main__":
    main()
