"""The one place where tolerances are taken from; the rule itself is in mplug2/tolerances.py, for doctor as well."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mplug2.tolerances import GLOBAL, LOCAL, LOCAL_FROM_LSE, LOCAL_LONG_SUM, distance, judge

__all__ = [
    "GLOBAL",
    "LOCAL",
    "LOCAL_FROM_LSE",
    "LOCAL_LONG_SUM",
    "PARITY",
    "assert_close",
    "assert_close_together",
    "distance",
    "draws",
]

# Model outputs against the golden numbers, relative to the largest entry.
PARITY = {torch.float32: 2e-5, torch.float64: 1e-10}


def assert_close(
    actual: Tensor, baseline: Tensor, truth: Tensor, *, local: float = LOCAL, dtype: torch.dtype | None = None
) -> None:
    """`actual` keeps both rules (mplug2.tolerances.judge)."""
    complaint = judge(actual, baseline, truth, local=local, dtype=dtype).complaint
    assert not complaint, complaint


def draws(make: Callable[[int], dict[str, Tensor]], most: int = 16) -> list[dict[str, Tensor]]:
    """make(0), make(1), ...: more draws of smaller tensors, up to `most`.

    In a tensor of a few numbers the rules measure luck: of correct bfloat16 gradients of 4 to 32 numbers one in six is
    more than 5e-6 from the truth, although their mean is 4e-6 (the baseline's 5e-6), and other ones on another CPU.
    """
    first = make(0)
    size = sum(t.numel() for t in first.values())
    return [first, *(make(seed) for seed in range(1, min(most, 200_000 // max(1, size))))]


def assert_close_together(runs: Sequence[Sequence[dict[str, Tensor]]]) -> None:
    """Several draws of (actual, baseline, truth) by name, judged as one: "out", and gradients as long sums are."""
    for name in runs[0][2]:
        columns = zip(*runs, strict=True)
        actual, baseline, truth = (torch.cat([part[name].flatten() for part in parts]) for parts in columns)
        assert_close(actual, baseline, truth, local=LOCAL if name == "out" else LOCAL_LONG_SUM)
