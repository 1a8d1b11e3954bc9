"""attention against SDPA on the shapes of the model: frames, all visual tokens, short queries, shared keys."""

import bench
import torch
import torch.nn.functional as F

from mplug2 import ops

# name: (B, G, S, K, backward)
SHAPES = {
    "self, one frame": (16, 1, 257, 257, True),
    "self, all visual tokens": (1, 1, 4097, 4097, False),
    "cross, text to vision": (1, 1, 25, 4097, True),
    "decode, 5 beams share keys": (1, 5, 1, 4097, False),
    "decode, self": (5, 1, 1, 20, False),
}


def sdpa(q, k, v):
    """As usually written: keys and values copied for every row of q, heads moved in front."""
    groups = q.shape[0] // k.shape[0]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def run_case(args, dtype: str, name: str) -> None:
    torch.manual_seed(0)
    batch, groups, queries, keys, backward = SHAPES[name]
    heads = (args.heads, args.head_dim)
    if queries == keys:  # views into a packed projection
        q, k, v = torch.randn(batch, keys, 3, *heads).to(bench.DTYPES[dtype]).unbind(2)
    else:
        q = torch.randn(batch * groups, queries, *heads).to(bench.DTYPES[dtype])
        k, v = torch.randn(batch, keys, 2, *heads).to(q.dtype).unbind(2)
    shape = f"{name}: B={batch} G={groups} S={queries} K={keys} N={heads[0]} H={heads[1]}"
    gflop = 4e-9 * batch * groups * queries * keys * heads[0] * heads[1]
    with torch.no_grad():
        torch.testing.assert_close(ops.attention(q, k, v), sdpa(q, k, v), rtol=0.02, atol=0.02)
        candidates = {"ours": lambda: ops.attention(q, k, v), "SDPA": lambda: sdpa(q, k, v)}
        timings = bench.measure(candidates, args.rounds)
    bench.report("attention forward", dtype, shape, timings, gflop=gflop)
    if not backward:
        return

    def step(function):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = function(*leaves)
        out.backward(torch.ones_like(out))

    candidates = {"ours": lambda: step(ops.attention), "SDPA": lambda: step(sdpa)}
    timings = bench.measure(candidates, max(3, args.rounds // 3))
    bench.report("attention forward + backward", dtype, shape, timings, gflop=3.5 * gflop)


def main() -> None:
    args = bench.arguments(__doc__, heads=16, head_dim=64)
    bench.start()
    for dtype in args.dtype:
        for name in SHAPES:
            run_case(args, dtype, name)
    bench.finish()


if __name__ == "__main__":
    main()
