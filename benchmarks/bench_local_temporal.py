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
    with bench.our_layer() as layer:
        run(args, layer)
    bench.finish()


def run(args, layer: str) -> None:
    for dtype in args.dtype:
        torch.manual_seed(0)
        tokens = 1 + args.grid**2
        module = LocalTemporal(args.width)
        for p in module.parameters():
            nn.init.normal_(p, std=0.05)
        module = module.to(args.device, bench.DTYPES[dtype])
        published = reference_structure.PublishedLocalTemporal(module)
        x = torch.randn(args.batch, args.frames, tokens, args.width, device=args.device).to(bench.DTYPES[dtype])
        patches = x[:, :, 1:].unflatten(2, (args.grid, args.grid)).permute(0, 4, 1, 2, 3).contiguous()
        hidden = torch.randn(*x.shape[:3], args.width // 2).to(x)
        inputs, frames_inputs = bench.Inputs(x), bench.Inputs(patches)
        shape = f"B={args.batch} T={args.frames} L={tokens} D={args.width}"
        gflop = 4e-9 * x.numel() * args.width // 2

        gigabytes = 2e-9 * x.numel() * x.element_size()
        down, up = module.down, module.up

        def products(x, down=down, up=up, hidden=hidden):
            F.linear(x, down.weight, down.bias)
            F.linear(hidden, up.weight, up.bias)

        def from_tokens(x, published=published, grid=args.grid):
            """The published module with its changes of layout, on the tokens of a block (L, B*T, D)."""
            frames = published(x[:, :, 1:].unflatten(2, (grid, grid)).permute(0, 4, 1, 2, 3).contiguous())
            return torch.cat([x[:, :, :1], frames.permute(0, 2, 3, 4, 1).flatten(2, 3)], dim=2)

        def in_place(x, module=module):
            return reference_structure.token_layout_local_temporal(x, module)

        with torch.no_grad():
            some = x[:1]
            truth = in_place(some.double(), module.double())
            module.to(x.dtype)
            runs = {
                "ours": module,
                "GEMMs alone": products,
                "published structure eager": from_tokens,
                "token layout eager": in_place,
                **bench.compiled(from_tokens, args, "published structure compiled"),
                **bench.compiled(in_place, args, "token layout compiled"),
            }
            errors = {
                name: (runs[name](some) - truth).abs().max().item()
                for name in ("ours", "published structure eager", "token layout eager")
            }
            candidates = {name: lambda run=run, inputs=inputs: run(*inputs.next()) for name, run in runs.items()}
            timings = bench.measure(bench.present(candidates), args.rounds)
            bench.report(
                "local_temporal forward", dtype, shape, timings, gflop=gflop, gigabytes=gigabytes, errors=errors,
                baseline="token layout eager", layer=layer,
            )  # fmt: skip

        def step(run, inputs):
            leaf = inputs.next()[0].detach().requires_grad_()
            out = run(leaf)
            out.backward(torch.ones_like(out))

        steps = {
            "ours": (module, inputs),
            "published structure eager": (published, frames_inputs),
            "token layout eager": (in_place, inputs),
        }
        if args.device == "cuda":
            steps |= {
                name: (run, inputs)
                for source, name in ((from_tokens, "published structure"), (in_place, "token layout"))
                for name, run in bench.compiled(source, args, f"{name} compiled").items()
            }
        candidates = {name: lambda run=run, x=x: step(run, x) for name, (run, x) in steps.items()}
        timings = bench.measure(bench.present(candidates), max(3, args.rounds // 3))
        bench.report(
            "local_temporal forward + backward", dtype, shape, timings, gflop=3 * gflop, gigabytes=2.5 * gigabytes,
            layer=layer,
        )  # fmt: skip


if __name__ == "__main__":
    main()
