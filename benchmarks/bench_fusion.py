"""fusion against projecting keys and values: text queries over the tokens of a video, and beams that share them."""

import bench
import torch
import torch.nn.functional as F

from mplug2 import ops

# name: (G, S, backward)
SHAPES = {"text to vision": (1, 25, True), "decode, 5 beams": (5, 1, False)}


def main() -> None:
    args = bench.arguments(__doc__, batch=1, keys=4097, width=1024, head_dim=64)
    bench.start()
    with bench.our_layer() as layer:
        for dtype in args.dtype:
            for name in SHAPES:
                run_case(args, dtype, name, layer)
    bench.finish()


def run_case(args, dtype: str, name: str, layer: str) -> None:
    torch.manual_seed(0)
    groups, queries, backward = SHAPES[name]
    heads, width, batch, keys = args.width // args.head_dim, args.width, args.batch, args.keys
    x = torch.randn(batch, keys, width).to(args.device, bench.DTYPES[dtype])
    q = torch.randn(batch * groups, queries, heads, args.head_dim).to(x)
    packed, bias = (torch.randn(2 * width, width) / width**0.5).to(x), torch.randn(2 * width).to(x)
    inputs = bench.Inputs(q, x, packed, bias)

    def ours(q, x, packed, bias):
        return ops.fusion(q, x, *packed.chunk(2), bias.chunk(2)[1])

    def projected(q, x, packed, bias):
        k, v = ops.linear(x, packed, bias).unflatten(-1, (2, *q.shape[2:])).unbind(2)
        return ops.attention(q, k, v)

    def sdpa(q, x, packed, bias):
        k, v = F.linear(x, packed, bias).unflatten(-1, (2, *q.shape[2:])).unbind(2)
        folded = q.reshape(x.shape[0], -1, *q.shape[2:])
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (folded, k, v)))
        return out.transpose(1, 2).reshape(q.shape)

    runs = {"ours": ours, "projected": projected, "projected, SDPA": sdpa}
    with torch.no_grad():
        some = (q[:groups], x[:1], packed, bias)
        truth = sdpa(*(t.double() for t in some))
        errors = {name: (run(*some) - truth).abs().max().item() for name, run in runs.items()}
        torch.testing.assert_close(ours(*inputs.next()), sdpa(*inputs.next()), rtol=0.02, atol=0.02)
        candidates = bench.present({name: lambda run=run: run(*inputs.next()) for name, run in runs.items()})
        timings = bench.measure(candidates, args.rounds)
    shape = f"{name}: B={batch} G={groups} S={queries} K={keys} N={heads} H={args.head_dim} D={width}"
    scores = 1e-9 * batch * groups * queries * heads * keys
    gflop = 4 * scores * width + 4e-9 * batch * groups * queries * width * width
    gigabytes = 1e-9 * q.element_size() * (x.numel() + 2 * q.numel() + packed.numel())
    bench.report(
        "fusion forward", dtype, shape, timings, gflop=gflop, gigabytes=gigabytes, exponentials=scores, errors=errors,
        baseline="projected, SDPA", layer=layer,
    )  # fmt: skip
    if not backward:
        return

    def step(function):
        out = function(*(t.detach().requires_grad_() for t in inputs.next()))
        out.backward(torch.ones_like(out))

    candidates = bench.present({name: lambda run=run: step(run) for name, run in runs.items()})
    timings = bench.measure(candidates, max(3, args.rounds // 3))
    bench.report(
        "fusion forward + backward", dtype, shape, timings, gflop=3 * gflop, gigabytes=3 * gigabytes,
        exponentials=scores, layer=layer,
    )  # fmt: skip


if __name__ == "__main__":
    main()
