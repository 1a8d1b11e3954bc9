"""add_layer_norm against addition and LayerNorm apart, eager and compiled."""

import bench
import torch
import torch.nn.functional as F

from mplug2 import ops


def apart(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5), total


def ours(x, residual, weight, bias):
    return ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)


def run_case(args, dtype: str) -> None:
    torch.manual_seed(0)
    sizes = ((args.rows, args.width), (args.rows, args.width), (args.width,), (args.width,))
    tensors = [torch.randn(size).to(bench.DTYPES[dtype]) for size in sizes]
    shape = f"rows={args.rows} D={args.width}"

    def step(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.autograd.backward(function(*leaves), [tensors[0], tensors[1]])

    with torch.no_grad():
        torch.testing.assert_close(ours(*tensors)[0], apart(*tensors)[0], rtol=0.02, atol=0.02)
        candidates = {
            "ours": lambda: ours(*tensors),
            "apart eager": lambda: apart(*tensors),
            **bench.compiled(lambda: apart(*tensors), args, "apart compiled"),
        }
        bench.report("add_layer_norm forward", dtype, shape, bench.measure(candidates, args.rounds))
    candidates = {"ours": lambda: step(ours), "apart eager": lambda: step(apart)}
    bench.report("add_layer_norm forward + backward", dtype, shape, bench.measure(candidates, args.rounds))


def main() -> None:
    args = bench.arguments(__doc__, rows=4112, width=1024)
    bench.start()
    for dtype in args.dtype:
        run_case(args, dtype)
    bench.finish()


if __name__ == "__main__":
    main()
