"""GPUs that bounds and roofs are made for: their limits, and rates measured (ceilings.py) or assumed."""

from __future__ import annotations

from dataclasses import dataclass

FLOP_OF_MMA = 2 * 16 * 8 * 16  # one m16n8k16
SCHEDULERS = 4  # of a multiprocessor; warp w belongs to w % 4


@dataclass(frozen=True)
class Rate:
    """Units a second, and where the number is from."""

    value: float
    source: str  # "measured", or "assumed: ..."

    @property
    def is_assumed(self) -> bool:
        return self.source != "measured"


@dataclass(frozen=True)
class Device:
    """Limits of a multiprocessor, and rates of the whole device."""

    name: str
    arch: str  # as cuda_report names it
    multiprocessors: int
    shared_bytes: int  # of a multiprocessor, for blocks
    rates: dict[str, Rate]  # bytes (dram, l2), wavefronts, m16n8k16, exponentials, warp instructions; product: FLOP
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


def _by_clock(multiprocessors: int, hertz: float) -> dict[str, Rate]:
    """What one multiprocessor does in a cycle: a wavefront, 16 exponentials, an instruction of each scheduler."""
    source = f"assumed: {multiprocessors} multiprocessors at {hertz / 1e9:.2f} GHz"
    each = {"shared": 1, "exp": 16, "issue": SCHEDULERS}
    return {name: Rate(multiprocessors * hertz * count, source) for name, count in each.items()}


# Of an H100 80GB HBM3, by ceilings.py; the H200 has the same chip. 33.3 TB/s of shared memory are 1.97 GHz.
_HOPPER = {
    **_by_clock(132, 1.97e9),
    "l2": Rate(7.98e12, "measured"),
    "mma": Rate(0.160e12, "measured"),
    "shared": Rate(0.260e12, "measured"),
    "exp": Rate(4.25e12, "measured"),
}
DEVICES = {
    device.name: device
    for device in (
        Device("A100", "80", 108, 164 * 1024, {
            "dram": Rate(1.8e12, "assumed: 88 % of the data sheet's 2.04 TB/s"),
            "l2": Rate(4.0e12, "assumed"),
            "mma": Rate(0.9 * 312e12 / FLOP_OF_MMA, "assumed: 90 % of the data sheet's 312 TFLOP/s"),
            "product": Rate(0.85 * 312e12, "assumed: 85 % of the data sheet's 312 TFLOP/s"),
            **_by_clock(108, 1.41e9),
        }),
        Device("H100", "90", 132, 228 * 1024, {
            **_HOPPER, "dram": Rate(2.80e12, "measured"), "product": Rate(744e12, "measured"),
        }),
        Device("H200", "90", 132, 228 * 1024, {
            **_HOPPER, "dram": Rate(4.3e12, "measured"), "product": Rate(788e12, "measured"),
        }),
    )
}  # fmt: skip


def with_ceilings(device: Device, found: dict) -> Device:
    """The device with the rates that ceilings.py measured on one (its JSON)."""
    rates = {name: rate["median"] for name, rate in found["rates"].items()}
    here = {"dram": rates["copy"], "l2": rates["l2_read"], "mma": rates["mma"], "exp": rates["exp2"]}
    # 128 bytes a wavefront
    here["shared"] = max(rates["shared_ldmatrix"], rates["shared_load16"]) / 128
    if "product" in rates:
        here["product"] = rates["product"]
    measured = {name: Rate(value, "measured") for name, value in here.items()}
    return Device(device.name, device.arch, found["multiprocessors"], device.shared_bytes, {**device.rates, **measured})
