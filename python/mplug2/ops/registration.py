"""The Python half of an op: reference, fake, autograd and autocast rule, beside the C++ schema and kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mplug2 import _library

_library.load_ops()
_library.load_cuda()

DEVICES = ("cpu", "cuda")
LOW, FULL, AS_GIVEN = "low", "full", "as given"  # autocast rules: the context's dtype, float32, no change

_devices: dict[str, frozenset[str]] = {}  # of every registered op, the devices that have a compiled kernel


def register(
    name: str,
    *,
    reference: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast: str = AS_GIVEN,
) -> Callable:
    """Complete the op `mplug2::<name>` and return it, ready to be called.

    `reference` runs on devices without a kernel, and on the CPU where the kernel calls `mplug2::<name>_reference`.
    `backward` and `setup_context` are those of `torch.library.register_autograd`. Under autocast floating point
    arguments are cast by the rule, and products inside are left alone: a kernel reads what it asked for.
    """
    qualified = f"mplug2::{name}"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    _devices[name] = frozenset(device for device in DEVICES if has(qualified, device.upper()))
    for target in (qualified, f"{qualified}_reference"):
        torch.library.impl(target, "CompositeExplicitAutograd", reference)
        torch.library.register_fake(target, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    op = getattr(torch.ops.mplug2, name).default
    for device in DEVICES:
        _register_autocast(op, device, autocast)
    return op


def _register_autocast(op: torch._ops.OpOverload, device: str, rule: str) -> None:
    key = f"Autocast{device.upper()}"
    off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args):
        if rule != AS_GIVEN:
            dtype = torch.float32 if rule == FULL else torch.get_autocast_dtype(device)
            args = [_cast(arg, dtype) for arg in args]
        with torch._C._ExcludeDispatchKeyGuard(off):
            return op(*args)

    torch.library.impl(op.name(), key, kernel)


def _cast(arg: object, dtype: torch.dtype) -> object:
    """PyTorch's own rule: floating point tensors but float64 ones."""
    if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64:
        return arg.to(dtype)
    return arg


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow: then an op keeps what its backward kernel reads."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def has_kernel(name: str, tensor: Tensor) -> bool:
    """Whether a compiled kernel of the op may serve on the device of `tensor` (else its reference does)."""
    device = tensor.device
    return device.type in _devices[name] and (device.type != "cuda" or _may_serve(name, device.index))


@torch.compiler.assume_constant_result
def _may_serve(name: str, index: int) -> bool:
    major, minor = torch.cuda.get_device_capability(index)
    return torch.ops.mplug2_cuda.may_serve(name, 10 * major + minor)


def layers() -> list[tuple[str, str, str]]:
    """For every op: its name, the layer that would run it on this machine, and why."""
    isa = torch.ops.mplug2_cpu.instruction_set()
    products = (
        "bfloat16 multiplied in hardware"
        if torch.ops.mplug2_cpu.has_bf16_products()
        else "bfloat16 multiplied in float32, as this CPU has no bfloat16 products"
    )
    kernel = f"float32 and bfloat16 by the compiled kernel, {products}"
    rows = []
    for name, devices in _devices.items():
        layer, reason = (f"cpu {isa}", kernel) if "cpu" in devices else ("reference", "no compiled kernel for the CPU")
        if "cuda" in devices:
            reason += "; on CUDA bfloat16 and float16 by kernels where they are proven"
        rows.append((name, layer, reason + "; all else by the reference"))
    return rows


_forced = {"cpu": "", "cuda": ""}  # the layer that layer() holds a device to; "" is the usual choice


@contextmanager
def layer(name: str) -> Iterator[None]:
    """Force the layer that runs ops: "reference" on every device; an instruction set that this CPU has, "baseline",
    "avx2", "avx512" or "amx", on the CPU; "portable", the kernels for every GPU since Ampere, proven or not, on CUDA.

    For tests and benchmarks; it holds for the whole process while the context is open, and contexts nest.

    Raises:
        RuntimeError: this machine does not have that layer.
    """
    if name == "portable" and _library.load_cuda().path is None:
        raise RuntimeError(f'layer: "portable" is CUDA kernels, and there are none: {_library.load_cuda().reason}')
    before = dict(_forced)
    devices = DEVICES if name == "reference" else ("cuda",) if name == "portable" else ("cpu",)
    try:
        _force({**before, **dict.fromkeys(devices, name)})
        yield
    finally:
        _force(before)


def _force(names: dict[str, str]) -> None:
    torch.ops.mplug2_cpu.force_instruction_set(names["cpu"])
    if _library.load_cuda().path is not None:
        torch.ops.mplug2_cuda.force_layer(names["cuda"])
    _forced.update(names)


def shape_text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
