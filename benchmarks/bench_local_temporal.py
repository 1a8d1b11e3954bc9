"""local_temporal, forward and backward, against its products alone, the published structure and the token layout."""

import bench
import reference_structure
import torch
import torch.nn.functional as F
from torch import nn

from mplug2.modules.vision import LocalTemporal


def main() -> None:
    args = bench.arguments(__doc__, batch=1, frames=16, grid=16, width=1024)
    bench.start()
    for dtype in args.dtype:
        torch.manual_seed(0)
        tokens = 1 + args.grid**2
        module = LocalTemporal(args.width)
        for p in module.parameters():
            nn.init.normal_(p, std=0.05)
        module = module.to(bench.DTYPES[dtype])
        published = reference_structure.PublishedLocalTemporal(module)
        x = torch.randn(args.batch, args.frames, tokens, args.width).to(bench.DTYPES[dtype])
        patches = x[:, :, 1:].unflatten(2, (args.grid, args.grid)).permute(0, 4, 1, 2, 3).contiguous()
        hidden = torch.randn(*x.shape[:3], args.width // 2).to(x.dtype)
        shape = f"B={args.batch} T={args.frames} L={tokens} D={args.width}"
        gflop = 4e-9 * x.numel() * args.width // 2

        def products(module=module, x=x, hidden=hidden):
            F.linear(x, module.down.weight, module.down.bias)
            F.linear(hidden, module.up.weight, module.up.bias)

        def from_tokens(x=x, published=published, grid=args.grid):
            """The published module with its changes of layout, on the tokens of a block (L, B*T, D)."""
            frames = published(x[:, :, 1:].unflatten(2, (grid, grid)).permute(0, 4, 1, 2, 3).contiguous())
            return torch.cat([x[:, :, :1], frames.permute(0, 2, 3, 4, 1).flatten(2, 3)], dim=2)

        def in_place(x=x, module=module):
            return reference_structure.token_layout_local_temporal(x, module)

        with torch.no_grad():
            truth = in_place(x.double(), module.double())
            module.to(x.dtype)
            errors = {
                "ours": (module(x) - truth).abs().max().item(),
                "token layout eager": (in_place() - truth).abs().max().item(),
            }
            candidates = {
                "ours": lambda module=module, x=x: module(x),
                "GEMMs alone": products,
                "published structure eager": from_tokens,
                "token layout eager": in_place,
                **bench.compiled(from_tokens, args, "published structure compiled"),
                **bench.compiled(in_place, args, "token layout compiled"),
            }
            timings = bench.measure(candidates, args.rounds)
            bench.report("local_temporal forward", dtype, shape, timings, gflop=gflop, errors=errors)

        def step(run, x):
            leaf = x.detach().requires_grad_()
            out = run(leaf)
            out.backward(torch.ones_like(out))

        candidates = {
            "ours": lambda module=module, x=x: step(module, x),
            "published structure eager": lambda published=published, x=patches: step(published, x),
            "token layout eager": lambda run=in_place, x=x: step(run, x),
        }
        timings = bench.measure(candidates, max(3, args.rounds // 3))
        bench.report("local_temporal forward + backward", dtype, shape, timings, gflop=3 * gflop)
    bench.finish()


if __name__ == "__main__":
    main()
