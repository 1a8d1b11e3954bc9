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


def run_case(args, dtype: str, layer: str) -> None:
    torch.manual_seed(0)
    number = bench.DTYPES[dtype]
    x, residual = (torch.randn(args.rows, args.width, device=args.device).to(number) for _ in range(2))
    weight, bias = (torch.randn(args.width, device=args.device).to(number) for _ in range(2))
    inputs = bench.Inputs(x, residual)
    shape = f"rows={args.rows} D={args.width}"
    tensor_gigabytes = 1e-9 * x.numel() * x.element_size()

    def step(function, x, residual):
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
        torch.autograd.backward(function(*leaves), [x, residual])

    runs = {"ours": ours, "apart eager": apart, **bench.compiled(apart, args, "apart compiled")}
    with torch.no_grad():
        truth = apart(*(t.double() for t in (x, residual, weight, bias)))[0]
        errors = {name: (run(x, residual, weight, bias)[0] - truth).abs().max().item() for name, run in runs.items()}
        torch.testing.assert_close(ours(x, residual, weight, bias)[0].double(), truth, rtol=0.02, atol=0.05)
        candidates = {name: lambda run=run: run(*inputs.next(), weight, bias) for name, run in runs.items()}
        timings = bench.measure(bench.present(candidates), args.rounds)
    bench.report(
        "add_layer_norm forward", dtype, shape, timings,
        gigabytes=4 * tensor_gigabytes, errors=errors, baseline="apart eager", layer=layer,
    )  # fmt: skip
    trained = {"ours": ours, "apart eager": apart}
    candidates = {name: lambda run=run: step(run, *inputs.next()) for name, run in trained.items()}
    timings = bench.measure(candidates, args.rounds)
    bench.report(
        "add_layer_norm forward + backward", dtype, shape, timings,
        gigabytes=8 * tensor_gigabytes, baseline="apart eager", layer=layer,
    )  # fmt: skip


def main() -> None:
    args = bench.arguments(__doc__, rows=4112, width=1024)
    bench.start()
    with bench.our_layer() as layer:
        for dtype in args.dtype:
            run_case(args, dtype, layer)
    bench.finish()


if __name__ == "__main__":
    main()
