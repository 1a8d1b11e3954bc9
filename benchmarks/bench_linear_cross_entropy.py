"""linear_cross_entropy against all logits and F.cross_entropy, forward + backward."""

import bench
import torch
import torch.nn.functional as F

from mplug2 import ops


def main() -> None:
    args = bench.arguments(__doc__, rows=800, width=1024, vocabulary=30522)
    bench.start()
    with bench.our_layer() as layer:
        run(args, layer)
    bench.finish()


def run(args, layer: str) -> None:
    for dtype in args.dtype:
        torch.manual_seed(0)
        x = torch.randn(args.rows, args.width, device=args.device).to(bench.DTYPES[dtype])
        weight = (torch.randn(args.vocabulary, args.width) / args.width**0.5).to(x)
        bias = torch.randn(args.vocabulary).to(x)
        targets = torch.randint(0, args.vocabulary, (args.rows,)).to(args.device)

        def plain(x, weight, bias, targets=targets):
            return F.cross_entropy(F.linear(x, weight, bias).float(), targets)

        def ours(x, weight, bias, targets=targets):
            return ops.linear_cross_entropy(x, weight, targets, bias)

        torch.testing.assert_close(ours(x, weight, bias), plain(x, weight, bias), rtol=0.01, atol=0.01)

        inputs = bench.Inputs(x, weight, bias)

        def step(run, inputs=inputs):
            run(*(t.detach().requires_grad_() for t in inputs.next())).backward()

        candidates = {"ours": lambda step=step: step(ours), "all logits": lambda step=step: step(plain)}
        shape = f"rows={args.rows} D={args.width} V={args.vocabulary}"
        gflop = 8e-9 * args.rows * args.width * args.vocabulary
        # x and the weight once, and once more with their gradients
        gigabytes = 1e-9 * x.element_size() * 3 * (x.numel() + weight.numel())
        timings = bench.measure(bench.present(candidates), max(3, args.rounds // 3))
        bench.report(
            "linear_cross_entropy", dtype, shape, timings, gflop=gflop, gigabytes=gigabytes,
            exponentials=2e-9 * args.rows * args.vocabulary, layer=layer,
        )  # fmt: skip


if __name__ == "__main__":
    main()
