"""int8 linear layers for inference on a CPU: 8-bit weights, and activations rounded to 8 bits as they come.

    out = activation(s_r s_c (q_x q_w^T) + bias) + residual,   q_x = round(x / s_r),   q_w = round(w / s_c)

s_r = max |x| / 127 of every row (token), s_c = max |w| / 127 of every output channel: one token of large activations
costs the others nothing. The product is oneDNN's, exact in int32; what goes round it is ours, in float32
(`csrc/int8_linear`). `docs/quantization.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2._memory import return_free_memory
from mplug2.modules.layers import Linear
from mplug2.ops.linear import ACTIVATIONS

FORMATS = ("int8",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 256  # of one pass: what lies between rounding and result stays in the cache; whole matrices cost page faults
_ZERO = 128  # oneDNN's kernels for signed activations are a thousand times as slow as those for unsigned ones


class Int8Linear(nn.Module):
    """What `quantize_int8` puts in place of a `Linear`; same call. Weight and scales are no parameters: they are never
    trained, saved, moved or cast."""

    def __init__(self, linear: Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float()
        self._scales = (weight.abs().amax(1) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        rounded = (weight / self._scales[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self._bias = None if linear.bias is None else linear.bias.detach().float()
        self.num_bytes = rounded.numel() + 4 * self.out_features * (2 if linear.bias is None else 3)
        self.eval()

    @property
    def weight(self) -> Tensor:
        raise RuntimeError("int8 linear: has no weight to read, as an absorbed context does; leave absorb out")

    def forward(self, x: Tensor, *, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """x (..., in), float32, bfloat16 or float16 -> (..., out) of its dtype; see `ops.linear`.

        Raises:
            RuntimeError: in training mode, or where x needs a gradient.
            ValueError: device, dtype, shape or activation do not fit.
        """
        if self.training:
            raise RuntimeError("int8 linear: a quantized model cannot be trained; call eval()")
        if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
            raise RuntimeError("int8 linear: has no backward; call it under torch.no_grad()")
        if x.device.type != "cpu" or x.dtype not in DTYPES or x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"int8 linear: x must be float32, bfloat16 or float16 [*, {self.in_features}] on the CPU, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"int8 linear: activation must be None, 'gelu' or 'quick_gelu', got {activation!r}")
        shape = (*x.shape[:-1], self.out_features)
        if residual is not None and (residual.shape, residual.dtype) != (shape, x.dtype):
            raise ValueError(
                f"int8 linear: residual must be {x.dtype} {list(shape)}, got {residual.dtype} {list(residual.shape)}"
            )
        if x.dtype == torch.float16:  # has no compiled passes
            added = None if residual is None else residual.float()
            return self(x.float(), activation=activation, residual=added).half()
        out = x.new_empty(shape)
        rows = x.reshape(-1, self.in_features).split(_ROWS)
        outs = out.view(-1, self.out_features).split(_ROWS)
        added = [None] * len(rows) if residual is None else residual.reshape(-1, self.out_features).split(_ROWS)
        for part, residual_part, out_part in zip(rows, added, outs, strict=True):
            rounded, scales = torch.ops.mplug2_cpu.int8_round_rows(part)
            y = _product(rounded, self._weight, self._scales, self._zeros)
            torch.ops.mplug2_cpu.int8_finish(y, scales, self._bias, activation or "none", residual_part, out_part)
        return out

    def _apply(self, *args, **kwargs):
        raise RuntimeError("int8 linear: a quantized model stays on the CPU and in its dtype; make another one")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}, int8"


def quantize_int8(module: nn.Module) -> nn.Module:
    """Replace every `Linear` inside `module` by an int8 one, layer by layer, and give the module back in eval mode.

    The other layers stay as they are: norms, embeddings and the output layer tied to them, convolutions, local temporal
    modules, contrastive, matching and class heads. No parameter wants a gradient afterwards.

    Raises:
        ValueError: a layer is not on the CPU or not float32, bfloat16 or float16, or this CPU cannot.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, Linear) and (layer.weight.device.type != "cpu" or layer.weight.dtype not in DTYPES):
            raise ValueError(
                f"quantize: {name}.weight must be float32, bfloat16 or float16 on the CPU, got {layer.weight.dtype} on "
                f"{layer.weight.device}"
            )
    if not is_supported():
        raise ValueError("quantize: int8 needs an x86 CPU with VNNI and a torch with oneDNN; leave quantize out")
    for parent in [parent for parent in module.modules() if any(isinstance(c, Linear) for c in parent.children())]:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear):
                setattr(parent, name, Int8Linear(layer))
        del layer  # the last reference to its weight
        return_free_memory()  # the heap comes to be full of holes where weights were
    return module.requires_grad_(False).eval()


def is_quantized(module: nn.Module) -> bool:
    return any(isinstance(layer, Int8Linear) for layer in module.modules())


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, and of the int8 layers' weights, scales and biases."""
    int8 = sum(layer.num_bytes for layer in module.modules() if isinstance(layer, Int8Linear))
    return int8 + sum(p.numel() * p.element_size() for p in module.parameters())


def is_supported() -> bool:
    """Does oneDNN multiply 8-bit integers here, and exactly? CPUs before VNNI add pairs in 16 bits, which overflow."""
    width = 64
    try:
        weight = torch.ops.onednn.qlinear_prepack(torch.full((16, width), 127, dtype=torch.int8), None)
        largest = torch.full((1, width), 255, dtype=torch.uint8)
        y = _product(largest, weight, torch.ones(16), torch.zeros(16, dtype=torch.int32))
    except (RuntimeError, AttributeError):  # the op, or its kernel, is missing in this torch
        return False
    return bool((y == (255 - _ZERO) * 127 * width).all())


def _product(rounded: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """(rounded - 128) weight^T scales: (R, D) uint8, packed (D, out) int8 -> (R, out) float32."""
    return torch.ops.onednn.qlinear_pointwise(
        rounded, 1.0, _ZERO, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
