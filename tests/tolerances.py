"""The one place where tolerances live.

Truth is the reference in float64 on the CPU; the baseline is the same composition at the op's dtype.
"""

import math

import torch
from torch import Tensor

# Model outputs against the golden numbers, relative to the largest entry.
PARITY = {torch.float32: 2e-5, torch.float64: 1e-10}

# Largest |op - truth| in units of the baseline's: elementwise; for gradients that sum over many rows; for attention's
# gradients, whose weights exp(score - lse) all share the rounding of lse (worst seen 3.4, at 97 keys in float32).
LOCAL, LOCAL_LONG_SUM, LOCAL_FROM_LSE = 2.0, 3.0, 4.0
# 1 - 2<x, y> / (<x, x> + <y, y>) against the truth.
GLOBAL = {torch.bfloat16: 5e-6, torch.float16: 5e-7, torch.float32: 1e-10, torch.float64: 1e-24}


def assert_close(
    actual: Tensor, baseline: Tensor, truth: Tensor, *, local: float = LOCAL, dtype: torch.dtype | None = None
) -> None:
    """`actual` keeps both rules, and has its infinities and NaNs where `truth` has them.

    `dtype` is the dtype the op ran in, where its output is wider. Two allowances: the baseline's error counts as no
    smaller than half a unit of the output's dtype, or one of float32 arithmetic, at the largest entry (in tiny tensors
    it can be exact by luck); and where the baseline itself breaks the global rule (ill-conditioned gradients in
    bfloat16), the op need only do better than it.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    dtype = dtype or actual.dtype
    actual, baseline, truth = (t.detach().double() for t in (actual, baseline, truth))
    assert torch.equal(actual.isnan(), truth.isnan()), "NaN in other places than in the truth"
    infinite = truth.isinf()
    assert torch.equal(actual.isinf(), infinite), "infinities in other places than in the truth"
    assert torch.equal(actual[infinite], truth[infinite]), "infinities of another sign"
    finite = truth.isfinite()
    actual, baseline, truth = actual[finite], baseline[finite], truth[finite]
    if truth.numel() == 0:
        return
    error = (actual - truth).abs().max().item()
    unit = max(torch.finfo(dtype).eps / 2, min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))
    allowed = local * max((baseline - truth).abs().max().item(), unit * truth.abs().max().item())
    assert error <= allowed, f"largest error {error:.3e}, allowed {allowed:.3e} ({local} x the baseline's)"
    apart, allowed = distance(actual, truth), max(GLOBAL[dtype], distance(baseline, truth))
    assert apart <= allowed, f"distance {apart:.3e} from the truth, allowed {allowed:.1e}"


def distance(x: Tensor, y: Tensor) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>) in float64, computed as |x - y|^2 / (|x|^2 + |y|^2); 0 for two zeros."""
    x, y = x.double(), y.double()
    size = (x.square().sum() + y.square().sum()).item()
    apart = (x - y).square().sum().item()
    assert math.isfinite(size)
    return apart / size if size > 0 else 0.0
