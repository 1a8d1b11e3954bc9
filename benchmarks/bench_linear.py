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


def run_case(args, dtype: str, activation: str | None, layer: str) -> None:
    torch.manual_seed(0)
    function = EPILOGUES[activation]
    x = torch.randn(args.rows, args.width, device=args.device).to(bench.DTYPES[dtype])
    weight = (torch.randn(args.out, args.width) / args.width**0.5).to(x)
    bias = torch.randn(args.out).to(x)
    residual = () if activation else (torch.randn(args.rows, args.out).to(x),)
    inputs = bench.Inputs(x, *residual)

    def plain(x, residual=None):
        out = function(F.linear(x, weight, bias))
        return out if residual is None else out + residual

    def ours(x, residual=None):
        return ops.linear(x, weight, bias, activation=activation, residual=residual)

    runs = {"ours": ours, "GEMM alone": lambda x, residual=None: F.linear(x, weight, bias), "eager": plain}
    runs |= bench.compiled(plain, args, "compiled")
    gigabytes = 1e-9 * x.element_size() * (x.numel() + weight.numel() + args.rows * args.out * (1 + len(residual)))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, *residual), plain(x, *residual), rtol=0.02, atol=0.05)
        candidates = {name: lambda run=run: run(*inputs.next()) for name, run in runs.items()}
        timings = bench.measure(bench.present(candidates), args.rounds)
    shape = f"{activation or 'residual'}: rows={args.rows} D={args.width} out={args.out}"
    gflop = 2e-9 * args.rows * args.width * args.out
    bench.report("linear forward", dtype, shape, timings, gflop=gflop, gigabytes=gigabytes, layer=layer)


def main() -> None:
    args = bench.arguments(__doc__, rows=4112, width=1024, out=4096)
    bench.start()
    with bench.our_layer() as layer:
        for dtype in args.dtype:
            for activation in EPILOGUES:
                run_case(args, dtype, activation, layer)
    bench.finish()


if __name__ == "__main__":
    main()
