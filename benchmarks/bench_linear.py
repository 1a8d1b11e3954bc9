"""linear with its epilogues against the product alone and PyTorch's own operations after it."""

import bench
import torch
import torch.nn.functional as F

from mplug2 import ops

EPILOGUES = {
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "gelu": F.gelu,
    None: lambda z: z,
}


def main() -> None:
    args = bench.arguments(__doc__, rows=4112, width=1024, out=4096)
    bench.start()
    for dtype in args.dtype:
        for activation, function in EPILOGUES.items():
            torch.manual_seed(0)
            x = torch.randn(args.rows, args.width).to(bench.DTYPES[dtype])
            weight = (torch.randn(args.out, args.width) / args.width**0.5).to(x.dtype)
            bias = torch.randn(args.out).to(x.dtype)
            residual = None if activation else torch.randn(args.rows, args.out).to(x.dtype)

            def plain(x=x, weight=weight, bias=bias, residual=residual, function=function):
                out = function(F.linear(x, weight, bias))
                return out if residual is None else out + residual

            def ours(x=x, weight=weight, bias=bias, residual=residual, activation=activation):
                return ops.linear(x, weight, bias, activation=activation, residual=residual)

            with torch.no_grad():
                torch.testing.assert_close(ours(), plain(), rtol=0.02, atol=0.05)
                candidates = {
                    "ours": ours,
                    "GEMM alone": lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias),
                    "eager": plain,
                    **bench.compiled(plain, args, "compiled"),
                }
                timings = bench.measure(candidates, args.rounds)
            shape = f"{activation or 'residual'}: rows={args.rows} D={args.width} out={args.out}"
            bench.report("linear forward", dtype, shape, timings, gflop=2e-9 * args.rows * args.width * args.out)
    bench.finish()


if __name__ == "__main__":
    main()
