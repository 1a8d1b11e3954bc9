"""The plain PyTorch truth of every op: any device, any floating dtype, no score or logit matrix held whole.

In float64 these functions are what every kernel is tested against. They are also what runs wherever no kernel serves.
Letters: B batch, G rows of q that share one row of k and v, S queries, K keys, N heads, H head dim, T frames, L tokens,
D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 64 << 20  # scores or logits held at a time


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """Losses and log sum exps are float32, and float64 for float64 inputs."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _autograd_in_reach() -> AbstractContextManager:
    """Autograd also where the dispatcher has passed it already, as inside a TorchDispatchMode: an op's kernel runs
    below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (
        torch._C.DispatchKey.AutogradCPU,
        torch._C.DispatchKey.AutogradCUDA,
        torch._C.DispatchKey.ADInplaceOrView,
    ):
        excluded = excluded - torch._C.DispatchKeySet(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def gradients(forward: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `inputs` by running `forward` again under autograd; contiguous, zero where nothing depends on
    one."""
    with torch.enable_grad(), _autograd_in_reach():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = forward(*leaves)
        grads = torch.autograd.grad(out, leaves, dout, allow_unused=True, materialize_grads=True)
    return tuple(grad.contiguous() for grad in grads)


def attention_keys(
    q: Tensor, k: Tensor, key_lengths: Tensor | None, key_mask: Tensor | None, causal: bool
) -> Tensor | None:
    """Which keys each query sees: bool, broadcastable to (B, G, S, K); None means all of them."""
    batch, num_keys, num_queries = k.shape[0], k.shape[1], q.shape[1]
    position = torch.arange(num_keys, device=k.device)
    keys = None
    if key_lengths is not None:
        keys = (position < key_lengths.view(batch, 1)).view(batch, 1, 1, num_keys)
    if key_mask is not None:
        mask = key_mask.view(batch, 1, 1, num_keys)
        keys = mask if keys is None else keys & mask
    if causal and num_queries > 0:
        last = torch.arange(num_queries, device=k.device) + (num_keys - num_queries)
        below = (position <= last[:, None]).view(1, 1, num_queries, num_keys)
        keys = below if keys is None else keys & below
    return keys


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T over the seen keys) v through SDPA, K and V never copied. (B*G, S, N, H) -> the same
    shape."""
    rows, num_queries, num_heads, head_dim = q.shape
    batch, num_keys = k.shape[0], k.shape[1]
    if q.numel() == 0 or num_keys == 0:
        return q.new_zeros(q.shape) + 0 * q  # stays in the graph
    groups = rows // batch
    if num_queries == 1:
        causal = False  # the only query is the last one and sees every key
    square = causal and groups == 1 and num_queries == num_keys and key_lengths is None and key_mask is None
    keys = None if square else attention_keys(q, k, key_lengths, key_mask, causal)
    if scale is not None and scale <= 0:  # kernels of SDPA take the largest score before they scale: NaN
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    # G rows of q become G*S queries of one row of k, so that k and v are read in place.
    folded = q.reshape(batch, groups * num_queries, num_heads, head_dim).transpose(1, 2)
    seen = None
    if keys is not None:
        seen = keys.any(-1, keepdim=True)  # (B, 1, S or 1, 1)
        keys = keys | ~seen  # an empty row attends to all keys, then is zeroed: no NaN in either direction
        if keys.shape[2] > 1:
            keys = keys.expand(-1, groups, -1, -1).reshape(keys.shape[0], 1, groups * num_queries, num_keys)
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    if folded.stride(-1) != 1:
        folded = folded.contiguous()
    out = F.scaled_dot_product_attention(
        folded, k.transpose(1, 2), v.transpose(1, 2), attn_mask=keys, is_causal=square, scale=scale
    )
    out = out.transpose(1, 2).reshape(batch, groups, num_queries, num_heads, head_dim)
    if seen is not None:
        out = out.masked_fill(~seen.unsqueeze(-1), 0)
    return out.reshape(q.shape).contiguous()


def attention_lse(
    q: Tensor,
    k: Tensor,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """log sum exp of the scaled scores over the seen keys: (B*G, N, S), float32 (float64 for float64); -inf where
    none."""
    rows, num_queries, num_heads, head_dim = q.shape
    batch, num_keys = k.shape[0], k.shape[1]
    wide = accumulation_dtype(q)
    lse = torch.full((rows, num_heads, num_queries), -math.inf, dtype=wide, device=q.device)
    if q.numel() == 0 or num_keys == 0:
        return lse
    scale = head_dim**-0.5 if scale is None else scale
    groups = rows // batch
    keys = attention_keys(q, k, key_lengths, key_mask, causal)
    grouped = q.reshape(batch, groups, num_queries, num_heads, head_dim)
    step = max(1, _CHUNK_BYTES // (8 * rows * num_heads * num_keys))
    for start in range(0, num_queries, step):
        part = slice(start, start + step)
        scores = torch.einsum("bgsnh,bknh->bgnsk", grouped[:, :, part].to(wide), k.to(wide)) * scale
        if keys is not None:
            seen = keys[:, :, part] if keys.shape[2] > 1 else keys
            scores = scores.masked_fill(~seen.unsqueeze(2), -math.inf)
        lse[:, :, part] = scores.logsumexp(-1).flatten(0, 1)
    return lse


def absorbed(rows: Tensor, weight: Tensor, batch: int) -> Tensor:
    """Each head's rows through its part of a projection's weight: (B*G, S, N, H), (N*H, D) -> (B, G*S*N, D)."""
    heads, head_dim = rows.shape[2:]
    wide = torch.einsum("rsnh,nhd->rsnd", rows, weight.unflatten(0, (heads, head_dim)))
    return wide.reshape(batch, -1 if rows.numel() else 0, weight.shape[1])


def _items(batch: int, scores: int) -> list[slice]:
    """Slices of the batch with few enough scores, of which each item has so many."""
    step = max(1, _CHUNK_BYTES // max(1, 4 * scores))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _times_tokens(rows: Tensor, x: Tensor) -> Tensor:
    """rows x^T in float32 at least: bfloat16 would round scores of ten by 0.03."""
    wide = accumulation_dtype(x)
    return rows.to(wide) @ x.to(wide).mT


def fusion(
    q: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, weights, context) of attention over tokens x, keys and values never made: softmax(scale (q W_k) x^T) x W_v.

    weights are (B, G*S*N, K rounded up to 8, zeros at the end), context is (B, G*S*N, D).
    """
    batch, keys, width = x.shape
    queries = absorbed(q, key_weight, batch)
    weights = q.new_zeros(batch, queries.shape[1], -(-keys // 8) * 8)
    context = torch.empty_like(queries)
    for part in _items(batch, queries.shape[1] * keys):
        scores = _times_tokens(queries[part], x[part]) * scale
        if key_mask is None:
            shares = scores.softmax(-1).to(q.dtype)
        else:
            hidden = ~key_mask[part, None]
            shares = scores.masked_fill(hidden, -math.inf).softmax(-1).to(q.dtype)
            shares = shares.masked_fill(hidden, 0)  # not NaN where no key is seen
        weights[part, :, :keys] = shares
        context[part] = shares @ x[part]
    heads, head_dim = q.shape[2:]
    grouped = context.view(*q.shape[:3], width)
    out = torch.einsum("rsnd,nhd->rsnh", grouped, value_weight.unflatten(0, (heads, head_dim)))
    return out.contiguous(), weights, context


def fusion_bwd(
    dout: Tensor,
    q: Tensor,
    x: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    weights: Tensor,
    context: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (q, x, key_weight, value_weight) by dscores = scale weights (dweights - sum weights dweights)."""
    batch, keys, width = x.shape
    queries, dcontext = absorbed(q, key_weight, batch), absorbed(dout, value_weight, batch)
    weights = weights[..., :keys]
    dscores = torch.empty_like(weights, memory_format=torch.contiguous_format)
    for part in _items(batch, queries.shape[1] * keys):
        dweights = _times_tokens(dcontext[part], x[part])
        delta = (weights[part] * dweights).sum(-1, keepdim=True)
        dscores[part] = weights[part] * (dweights - delta) * scale
    dqueries = (dscores @ x).view(*q.shape[:3], width)
    dx = torch.cat([dscores, weights], 1).mT @ torch.cat([queries, dcontext], 1)  # one sum, rounded once
    heads, head_dim = q.shape[2:]
    dq = torch.einsum("rsnd,nhd->rsnh", dqueries, key_weight.unflatten(0, (heads, head_dim)))
    dkey_weight = torch.einsum("rsnh,rsnd->nhd", q, dqueries)
    dvalue_weight = torch.einsum("rsnh,rsnd->nhd", dout, context.view(*q.shape[:3], width))
    return dq.contiguous(), dx, dkey_weight.reshape(-1, width), dvalue_weight.reshape(-1, width)


def local_temporal(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    num_prefix_tokens: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """x + up(QuickGELU(conv over T(down(LN(x))))) on the tokens after the prefix. (B, T, L, D) -> the same shape."""
    tokens = x[:, :, num_prefix_tokens:]
    hidden = local_temporal_hidden(tokens, ln_weight, ln_bias, down_weight, down_bias, eps)
    mixed = hidden * conv_weight[:, 1] + conv_bias
    mixed = mixed + F.pad(hidden[:, :-1], (0, 0, 0, 0, 1, 0)) * conv_weight[:, 0]
    mixed = mixed + F.pad(hidden[:, 1:], (0, 0, 0, 0, 0, 1)) * conv_weight[:, 2]
    tokens = tokens + F.linear(quick_gelu(mixed), up_weight, up_bias)
    return torch.cat([x[:, :, :num_prefix_tokens], tokens], dim=2)


def local_temporal_hidden(
    tokens: Tensor, ln_weight: Tensor, ln_bias: Tensor, down_weight: Tensor, down_bias: Tensor, eps: float
) -> Tensor:
    """down(LN(x)), what the convolution over time reads."""
    return F.linear(layer_norm(tokens, ln_weight, ln_bias, eps), down_weight, down_bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(LN(x + residual), x + residual) over the last dimension."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "quick_gelu": quick_gelu}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x weight^T + bias) + residual."""
    out = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return out if residual is None else out + residual


def _logit_rows(weight: Tensor) -> int:
    return max(1, _CHUNK_BYTES // (8 * max(1, weight.shape[0])))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(x, weight, bias)
    return logits.to(accumulation_dtype(logits))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, log sum exp) of each row of x weight^T + bias: (M, D), (V, D), (M,) -> (M,), (M,); ignored rows lose 0."""
    if x.shape[0] == 0:
        empty = x.new_zeros(0, dtype=accumulation_dtype(x))
        return empty, empty.clone()
    losses, lses = [], []
    step = _logit_rows(weight)
    for rows, wanted in zip(x.split(step), targets.split(step), strict=True):
        logits = _logits(rows, weight, bias)
        lses.append(logits.logsumexp(-1))
        losses.append(
            F.cross_entropy(
                logits, wanted, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
            )
        )
    return torch.cat(losses), torch.cat(lses)


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias) by dlogits = dloss (softmax - (1 - a) onehot - a / V), a chunk of rows at a
    time."""
    vocabulary = weight.shape[0]
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dweight = torch.zeros(weight.shape, dtype=lse.dtype, device=x.device)
    dbias = torch.zeros(vocabulary, dtype=lse.dtype, device=x.device)
    step = _logit_rows(weight)
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        wanted = targets[part]
        counts = wanted != ignore_index
        dlogits = (_logits(x[part], weight, bias) - lse[part, None]).exp() - label_smoothing / vocabulary
        hot = wanted.where(counts, 0)[:, None]
        dlogits.scatter_add_(1, hot, dlogits.new_full(hot.shape, label_smoothing - 1))
        dlogits = (dlogits * (dloss[part] * counts)[:, None]).to(x.dtype)
        dx[part] = dlogits @ weight
        dweight += dlogits.t() @ x[part]
        dbias += dlogits.sum(0, dtype=lse.dtype)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
