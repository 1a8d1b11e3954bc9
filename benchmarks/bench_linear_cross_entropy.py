"""linear_cross_entropy against all logits and F.cross_entropy, forward + backward."""

import bench
import torch
import torch.nn.functional as F

from mplug2 import ops


def main() -> None:
    args = bench.arguments(__doc__, rows=800, width=1024, vocabulary=30522)
    bench.start()
    for dtype in args.dtype:
        torch.manual_seed(0)
        x = torch.randn(args.rows, args.width).to(bench.DTYPES[dtype])
        weight = (torch.randn(args.vocabulary, args.width) / args.width**0.5).to(x.dtype)
        bias = torch.randn(args.vocabulary).to(x.dtype)
        targets = torch.randint(0, args.vocabulary, (args.rows,))

        def plain(x, weight, bias, targets=targets):
            return F.cross_entropy(F.linear(x, weight, bias).float(), targets)

        def ours(x, weight, bias, targets=targets):
            return ops.linear_cross_entropy(x, weight, targets, bias)

        torch.testing.assert_close(ours(x, weight, bias), plain(x, weight, bias), rtol=0.01, atol=0.01)

        def step(run, x=x, weight=weight, bias=bias):
            run(*(t.detach().requires_grad_() for t in (x, weight, bias))).backward()

        candidates = {"ours": lambda step=step: step(ours), "all logits": lambda step=step: step(plain)}
        shape = f"rows={args.rows} D={args.width} V={args.vocabulary}"
        gflop = 8e-9 * args.rows * args.width * args.vocabulary
        bench.report(
            "linear_cross_entropy", dtype, shape, bench.measure(candidates, max(3, args.rounds // 3)), gflop=gflop
        )
    bench.finish()


if __name__ == "__main__":
    main()
