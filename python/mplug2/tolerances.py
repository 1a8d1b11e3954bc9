"""How far an op may be from the truth: the rule of the tests and of `mplug2 doctor`.

Truth is the reference in float64 on the CPU; the baseline is the same composition at the op's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest |op - truth| in units of the baseline's: elementwise; for gradients that sum over many rows; for attention's
# gradients, whose weights exp(score - lse) all share the rounding of lse (worst seen 3.4, at 97 keys in float32).
LOCAL, LOCAL_LONG_SUM, LOCAL_FROM_LSE = 2.0, 3.0, 4.0
# 1 - 2<x, y> / (<x, x> + <y, y>) against the truth.
GLOBAL = {torch.bfloat16: 5e-6, torch.float16: 5e-7, torch.float32: 1e-10, torch.float64: 1e-24}


@dataclass(frozen=True)
class Verdict:
    """`complaint` is "" where the op keeps both rules."""

    complaint: str
    error: float = 0.0  # largest |op - truth| in units of the baseline's
    distance: float = 0.0


def judge(
    actual: Tensor, baseline: Tensor, truth: Tensor, *, local: float = LOCAL, dtype: torch.dtype | None = None
) -> Verdict:
    """Whether `actual` keeps both rules, and has its infinities and NaNs where `truth` has them.

    `dtype` is the dtype the op ran in, where its output is wider. Two allowances: the baseline's error counts as no
    smaller than half a unit of the output's dtype, or one of float32 arithmetic, at the largest entry (in tiny tensors
    it can be exact by luck); and where the baseline itself breaks the global rule (ill-conditioned gradients in
    bfloat16), the op may be twice as far: two correct results are equally far on average, not each time.
    """
    if actual.shape != truth.shape:
        return Verdict(f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    dtype = dtype or actual.dtype
    actual, baseline, truth = (t.detach().double() for t in (actual, baseline, truth))
    if not torch.equal(actual.isnan(), truth.isnan()):
        return Verdict("NaN in other places than in the truth")
    infinite = truth.isinf()
    if not torch.equal(actual.isinf(), infinite):
        return Verdict("infinities in other places than in the truth")
    if not torch.equal(actual[infinite], truth[infinite]):
        return Verdict("infinities of another sign")
    finite = truth.isfinite()
    actual, baseline, truth = actual[finite], baseline[finite], truth[finite]
    if truth.numel() == 0:
        return Verdict("")
    error = (actual - truth).abs().max().item()
    unit = max(torch.finfo(dtype).eps / 2, min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))
    usual = max((baseline - truth).abs().max().item(), unit * truth.abs().max().item())
    apart, usual_apart = distance(actual, truth), distance(baseline, truth)
    allowed = GLOBAL[dtype] if usual_apart <= GLOBAL[dtype] else 2 * usual_apart
    complaint = ""
    if not error <= local * usual:
        complaint = f"largest error {error:.3e}, allowed {local * usual:.3e} ({local} x the baseline's)"
    elif not apart <= allowed:
        complaint = f"distance {apart:.3e} from the truth, allowed {allowed:.1e}"
    return Verdict(complaint, error / usual if usual else 0.0, apart)


def distance(x: Tensor, y: Tensor) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>) in float64, computed as |x - y|^2 / (|x|^2 + |y|^2); 0 for two zeros."""
    x, y = x.double(), y.double()
    size = (x.square().sum() + y.square().sum()).item()
    apart = (x - y).square().sum().item()
    if not math.isfinite(size):
        raise ValueError(f"distance: an infinite or missing number in {tuple(x.shape)}")
    return apart / size if size > 0 else 0.0
