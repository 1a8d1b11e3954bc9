"""The one place where tolerances live.

Truth is the reference in float64 on the CPU; the baseline is the same composition at the op's dtype.
"""

import math

import torch
from torch import Tensor

# Model outputs against the golden numbers, relative to the largest entry.
PARITY = {torch.float32: 2e-5, torch.float64: 1e-10}

# Largest |op - truth| in units of the baseline's: elementwise, and for gradients that sum over many rows.
LOCAL, LOCAL_LONG_SUM = 2.0, 3.0
# 1 - 2<x, y> / (<x, x> + <y, y>) against the truth.
GLOBAL = {torch.bfloat16: 5e-6, torch.float16: 5e-7, torch.float32: 1e-10, torch.float64: 1e-24}


def assert_close(
    actual: Tensor, baseline: Tensor, truth: Tensor, *, local: float = LOCAL, dtype: torch.dtype | None = None
) -> None:
    """`actual` keeps both rules, and has its infinities and NaNs where `truth` has them.

    `dtype` is the dtype the op ran in, where its output is wider. An element may differ from the baseline by the rounding of its own
    dtype even where the baseline happens to be exact.
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
    allowed = local * max((baseline - truth).abs().max().item(), torch.finfo(dtype).eps * truth.abs().max().item() / 2)
    assert error <= allowed, f"largest error {error:.3e}, allowed {allowed:.3e} ({local} x the baseline's)"
    apart = distance(actual, truth)
    assert apart <= GLOBAL[dtype], (
        f"distance {apart:.3e} from the truth, allowed {GLOBAL[dtype]:.0e}; the baseline's is {distance(baseline, truth):.3e}"
    )


def distance(x: Tensor, y: Tensor) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>) in float64, computed as |x - y|^2 / (|x|^2 + |y|^2); 0 for two zeros."""
    x, y = x.double(), y.double()
    size = (x.square().sum() + y.square().sum()).item()
    apart = (x - y).square().sum().item()
    assert math.isfinite(size)
    return apart / size if size > 0 else 0.0
