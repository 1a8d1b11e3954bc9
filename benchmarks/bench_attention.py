"""attention against SDPA on the shapes of the model: frames, all visual tokens, short queries, shared keys."""

import bench
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mplug2 import ops

# name: (B, G, S, K, mask, backward); "padded": a mask of keys, three quarters of them seen on average
SHAPES = {
    "self, one frame": (16, 1, 257, 257, "", True),
    "self, all visual tokens": (1, 1, 4097, 4097, "", True),
    "self, padded text": (1, 1, 50, 50, "padded", True),
    "self, causal text": (1, 1, 50, 50, "causal", True),
    "cross, text to vision": (1, 1, 25, 4097, "", True),
    "cross, padded vision": (1, 1, 25, 4097, "padded", True),
    "rank, 16 candidates share keys": (1, 16, 8, 4097, "", False),
    "decode, 5 beams share keys": (1, 5, 1, 4097, "", False),
    "decode, self": (5, 1, 1, 20, "", False),
}


def sdpa(q, k, v, key_mask=None, causal=False):
    """As usually written: keys and values copied for every row of q, heads moved in front."""
    groups = q.shape[0] // k.shape[0]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    mask = None if key_mask is None else key_mask[:, None, None]
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


def on_cuda(args, masked: bool) -> dict:
    """SDPA's backends one by one, and FlexAttention where there is no mask."""
    if args.device == "cpu":
        return {}

    def only(backend):
        def run(q, k, v, **mask):
            with sdpa_kernel(backend):
                return sdpa(q, k, v, **mask)

        return run

    names = {"SDPA flash": "FLASH_ATTENTION", "SDPA cudnn": "CUDNN_ATTENTION", "SDPA efficient": "EFFICIENT_ATTENTION"}
    peers = {name: only(getattr(SDPBackend, backend)) for name, backend in names.items()}
    if not args.no_compile and not masked:
        from torch.nn.attention.flex_attention import flex_attention

        peers["FlexAttention"] = torch.compile(
            lambda q, k, v: flex_attention(
                *(t.transpose(1, 2) for t in (q, *(t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))))
            ).transpose(1, 2)
        )
    return peers


def run_case(args, dtype: str, name: str, layer: str) -> None:
    torch.manual_seed(0)
    batch, groups, queries, keys, mask, backward = SHAPES[name]
    batch *= args.batch
    heads = (args.heads, args.head_dim)
    if queries == keys:  # views into a packed projection
        inputs = bench.Inputs(torch.randn(batch, keys, 3, *heads, device=args.device).to(bench.DTYPES[dtype]))
    else:
        q = torch.randn(batch * groups, queries, *heads, device=args.device).to(bench.DTYPES[dtype])
        inputs = bench.Inputs(q, torch.randn(batch, keys, 2, *heads, device=args.device).to(q.dtype))

    options, seen = {}, 1.0  # the share of keys that a query sees
    if mask == "causal":
        options, seen = {"causal": True}, (keys + 1) / (2 * keys)
    elif mask == "padded":
        lengths = torch.linspace(keys / 2, keys, batch).round().int()
        options = {"key_mask": (torch.arange(keys) < lengths[:, None]).to(args.device)}
        seen = lengths.float().mean().item() / keys

    def tensors():
        *first, packed = inputs.next()
        return *first, *packed.unbind(2)

    shape = f"{name}: B={batch} G={groups} S={queries} K={keys} N={heads[0]} H={heads[1]}"
    scores = 1e-9 * batch * groups * queries * keys * heads[0] * seen
    gflop = 4 * scores * heads[1]
    q, k, v = tensors()
    # q and out, k and v; the backward pass reads the four and dout, and writes dq, dk, dv
    gigabytes = 1e-9 * q.element_size() * (2 * q.numel() + 2 * k.numel())
    both = gigabytes + 1e-9 * q.element_size() * (4 * q.numel() + 4 * k.numel())
    runs = {"ours": ops.attention, "SDPA": sdpa, **on_cuda(args, bool(mask))}
    with torch.no_grad():
        some = (q[:groups], k[:1], v[:1])
        of_some = {name: t[:1] if isinstance(t, torch.Tensor) else t for name, t in options.items()}
        truth = sdpa(*(t.double() for t in some), **of_some)
        torch.testing.assert_close(ops.attention(q, k, v, **options), sdpa(q, k, v, **options), rtol=0.02, atol=0.02)
        candidates = bench.present({name: lambda run=run: run(*tensors(), **options) for name, run in runs.items()})
        errors = {name: (runs[name](*some, **of_some) - truth).abs().max().item() for name in ("ours", "SDPA")}
        timings = bench.measure(candidates, args.rounds)
    bench.report(
        "attention forward", dtype, shape, timings, gflop=gflop, gigabytes=gigabytes, exponentials=scores,
        errors=errors if args.device == "cuda" else None, baseline="SDPA", layer=layer,
    )  # fmt: skip
    if not backward:
        return

    def step(function):
        leaves = [t.detach().requires_grad_() for t in tensors()]
        out = function(*leaves, **options)
        out.backward(torch.ones_like(out))

    candidates = bench.present({name: lambda run=run: step(run) for name, run in runs.items()})
    timings = bench.measure(candidates, max(3, args.rounds // 3))
    bench.report(
        "attention forward + backward", dtype, shape, timings, gflop=3.5 * gflop, gigabytes=both,
        exponentials=2 * scores, layer=layer,
    )  # fmt: skip


def main() -> None:
    args = bench.arguments(__doc__, batch=1, heads=16, head_dim=64, shape="")
    bench.start()
    with bench.our_layer() as layer:
        for dtype in args.dtype:
            for name in (name for name in SHAPES if args.shape in name):
                run_case(args, dtype, name, layer)
    bench.finish()


if __name__ == "__main__":
    main()
