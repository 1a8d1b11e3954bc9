"""int8 linear layers: error bounds, semantics, what nano says with them, memory and errors."""

import json
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mplug2
from mplug2 import quantization
from mplug2.cli import app
from mplug2.data.clothes.folder import draw_file
from mplug2.data.clothes.pictures import BUNDLED, read_pictures
from mplug2.data.clothes.scripts import write_scripts
from mplug2.modules.layers import CrossAttention, Linear
from mplug2.ops import reference
from mplug2.quantization import Int8Linear, is_quantized, is_supported, quantize_int8, weight_bytes

pytestmark = pytest.mark.skipif(not is_supported(), reason="int8 needs an x86 CPU with VNNI and a torch with oneDNN")


def _linear(width, out, *, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = Linear(width, out, bias=bias).to(dtype).eval().requires_grad_(False)
    layer.weight[0] *= 30  # an output channel of large weights
    return layer


def _rows(*shape, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x.view(-1, shape[-1])[0] *= 1000  # a token of massive activations
    return x.to(dtype)


def _truth(x, layer):
    """The product in float64 and its bound: half a step of x through |w|, and half a step of w through |rounded x|."""
    x, weight = x.double(), layer.weight.double()
    x_step, w_step = x.abs().amax(-1, keepdim=True) / 127, weight.abs().amax(1) / 127
    largest_rounded = x.abs() + x_step / 2
    bound = x_step / 2 * weight.abs().sum(1) + w_step / 2 * largest_rounded.sum(-1, keepdim=True)
    product = x @ weight.t()
    return product if layer.bias is None else product + layer.bias.double(), bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "width", "out"), [((1,), 64, 48), ((5, 3), 37, 17), ((2, 300), 128, 96)])
def test_error_is_that_of_rounding_rows_and_channels(rows, width, out, bias, dtype):
    layer = _linear(width, out, bias=bias, dtype=dtype)
    x = _rows(*rows, width, dtype=dtype) / 100
    truth, bound = _truth(x, layer)
    actual = Int8Linear(layer)(x)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    slack = 1 + 1e-5  # of the float32 steps; the result is rounded to dtype once
    assert ((actual.double() - truth).abs() <= bound * slack + torch.finfo(dtype).eps * (truth.abs() + bound)).all()


def test_scales_are_of_each_row():
    layer = _linear(64, 48)
    x = _rows(9, 64)
    alone = Int8Linear(layer)(x[1:])
    assert torch.equal(Int8Linear(layer)(x)[1:], alone)  # the massive token costs the others nothing
    round_rows = torch.ops.mplug2_cpu.int8_round_rows
    rounded, scales = round_rows(x)
    torch.testing.assert_close((rounded.float() - 128) * scales, x, rtol=0, atol=x[0].abs().max().item() / 253)
    assert ((rounded.int() - 128).abs().amax(1) == 127).all()
    assert round_rows(torch.zeros(2, 8))[0].unique().tolist() == [128]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu"])
def test_activation_and_residual_mean_what_they_do_in_linear(activation, has_residual):
    """Weights and activations that 8 bits hold exactly: nothing is left but float32's own rounding."""
    g = torch.Generator().manual_seed(0)
    layer = _linear(32, 24)
    layer.weight.copy_(torch.randint(-127, 128, (24, 32), generator=g) / 512)
    layer.weight[:, 0] = 127 / 512
    x = torch.randint(-127, 128, (2, 150, 32), generator=g) / 64
    x[..., 0] = 127 / 64
    residual = torch.randn(2, 150, 24, generator=g) if has_residual else None
    actual = Int8Linear(layer)(x, activation=activation, residual=residual)
    z = reference.linear(x.double(), layer.weight.double(), layer.bias.double())
    expected = reference.ACTIVATIONS[activation or "none"](z) + (0 if residual is None else residual.double())
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-5)


def test_empty_batches_strides_and_nan():
    layer = Int8Linear(_linear(16, 8))
    assert layer(torch.empty(0, 3, 16)).shape == (0, 3, 8)
    x = _rows(16, 5).t()
    assert torch.equal(layer(x), layer(x.contiguous()))
    x = _rows(3, 16)
    x[1, 2] = float("nan")
    assert layer(x).isnan().all(1).tolist() == [False, True, False]


def test_only_linear_layers_are_replaced_and_memory_falls():
    parts = mplug2.compose(["video-qa"], "nano", dtype=torch.bfloat16)
    layers = [layer for layer in parts.modules() if isinstance(layer, Linear)]
    before, linear = weight_bytes(parts), sum(2 * (m.weight.numel() + m.bias.numel()) for m in layers)
    kept = sum(2 * p.numel() for p in parts.parameters()) - linear
    assert quantize_int8(parts) is parts
    assert is_quantized(parts)
    assert not any(isinstance(layer, Linear) for layer in parts.modules())
    assert sum(2 * p.numel() for p in parts.parameters()) == kept
    assert sum(isinstance(layer, Int8Linear) for layer in parts.modules()) == len(layers)
    assert weight_bytes(parts) == kept + sum(m.weight.numel() + 12 * m.bias.numel() for m in layers)
    assert weight_bytes(parts) < before
    assert weight_bytes(Int8Linear(_linear(16, 8, bias=False))) == 16 * 8 + 8 * 8  # weights; scales, zero points
    assert type(parts.vision.blocks[0].local_temporal1.down) is nn.Linear
    assert "int8" in repr(parts)


def test_weights_are_let_go_one_by_one(monkeypatch):
    parts = mplug2.compose(["video-qa"], "nano")
    alive = [weakref.ref(layer) for layer in parts.modules() if isinstance(layer, Linear)]
    counts = []
    monkeypatch.setattr(quantization, "return_free_memory", lambda: counts.append(sum(r() is not None for r in alive)))
    quantize_int8(parts)
    assert counts[-1] == 0
    assert all(later < earlier for earlier, later in pairwise([len(alive), *counts]))


def test_nano_names_what_it_sees():
    pictures = read_pictures(BUNDLED, "test")
    scripts = write_scripts(pictures, 12, np.random.default_rng(2023), "all")
    files = [draw_file(scripts[i : i + 1], pictures) for i in range(12)]
    model = mplug2.create_model("nano", quantize="int8", dtype=torch.bfloat16)
    plain = mplug2.create_model("nano")
    videos = torch.stack([model.read(file) for file in files])
    captions, truths = model.caption(videos), scripts.captions()
    assert is_quantized(model)
    assert sum(c.split()[1] == t.split()[1] for c, t in zip(captions, truths, strict=True)) == 12  # colors
    assert sum(c == t for c, t in zip(captions, plain.caption(videos), strict=True)) >= 11
    assert len(model.answer(videos, "what is it?")) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, r"quantize must be None or 'int8', got 'int4'"),
        ({"quantize": "int8", "device": "cuda"}, r"is for the CPU, got device cuda"),
        ({"quantize": "int8", "dtype": torch.float64}, r"needs dtype float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_what_cannot_be_quantized_is_said_first(options, message):
    with pytest.raises(ValueError, match=message):
        mplug2.create_model("nano", **options)


def test_layers_elsewhere_and_cpus_without_vnni_are_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"0\.weight must be float32.* got torch\.float64 on cpu"):
        quantize_int8(nn.Sequential(Linear(4, 4).double()))
    monkeypatch.setattr("mplug2.quantization._product", lambda *_: torch.zeros(1, 16))
    with pytest.raises(ValueError, match="needs an x86 CPU with VNNI"):
        quantize_int8(nn.Sequential(Linear(4, 4)))


def test_quantized_layers_are_for_inference():
    layer, x = Int8Linear(_linear(16, 8)), _rows(3, 16)
    with pytest.raises(RuntimeError, match="no backward"):
        layer(x.requires_grad_())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        layer.train()(x.detach())
    layer.eval()
    for wrong in (x.double(), x[:, 1:]):
        with pytest.raises(ValueError, match=r"x must be float32, bfloat16 or float16 \[\*, 16\]"):
            layer(wrong.detach())
    with pytest.raises(ValueError, match="activation must be"):
        layer(x.detach(), activation="relu")
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \[3, 8\], got torch.float32 \[3, 16\]"):
        layer(x.detach(), residual=x.detach())
    with pytest.raises(RuntimeError, match="stays on the CPU and in its dtype"):
        layer.to(torch.bfloat16)
    cross = CrossAttention(16, 2).eval()
    cross.key_value = Int8Linear(cross.key_value)
    with pytest.raises(RuntimeError, match="leave absorb out"):
        cross(x.detach()[None], x.detach()[None])


def test_a_quantized_model_is_not_saved(tmp_path):
    model = mplug2.create_model("nano", quantize="int8")
    with pytest.raises(ValueError, match="a quantized model cannot be saved; save it before"):
        model.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="cannot be saved"):  # before anything is asked of the hub
        model.push_to_hub("owner/name")


def test_command_line_takes_it(tmp_path):
    pictures = read_pictures(BUNDLED, "test")
    scripts = write_scripts(pictures, 1, np.random.default_rng(2023), "all")
    clip = tmp_path / "clip.mp4"
    file = draw_file(scripts, pictures)
    clip.write_bytes(file if isinstance(file, bytes) else file.getvalue())
    result = CliRunner().invoke(app, ["caption", "--json", "--quantize", "int8", "--device", "cpu", str(clip)])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["caption"].startswith("a ")
    assert CliRunner().invoke(app, ["caption", "--quantize", "int4", str(clip)]).exit_code == 2


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets_agree(name, dtype):
    widest = torch.ops.mplug2_cpu.instruction_set()
    if name == "avx512" and widest not in ("avx512", "amx"):
        pytest.skip("this CPU has no AVX-512")
    x, layer = _rows(9, 133, dtype=dtype), Int8Linear(_linear(133, 50, dtype=dtype))
    residual = _rows(9, 50, dtype=dtype)
    rounded, scales = torch.ops.mplug2_cpu.int8_round_rows(x)
    expected = layer(x, activation="gelu", residual=residual)
    with mplug2.ops.layer(name):
        again, scales_again = torch.ops.mplug2_cpu.int8_round_rows(x)
        actual = layer(x, activation="gelu", residual=residual)
    torch.testing.assert_close(scales_again, scales, rtol=1e-6, atol=0)
    assert (again.int() - rounded.int()).abs().max() <= 1  # halves, by one rounding of the product or two
    error = (actual - expected).float().abs().amax(1)  # row by row: the first is a thousand times as large
    assert (error <= 1e-2 * expected.float().abs().amax(1)).all()


def test_compiled_passes_refuse_what_they_cannot_read():
    with pytest.raises(RuntimeError, match="int8 linear: must be float32 or bfloat16, got float16"):
        torch.ops.mplug2_cpu.int8_round_rows(torch.zeros(2, 4, dtype=torch.float16))
    with pytest.raises(RuntimeError, match=r"int8 linear: x must have shape \[R, D\]"):
        torch.ops.mplug2_cpu.int8_round_rows(torch.zeros(4))
    y, scales, out = torch.zeros(2, 4), torch.ones(2, 1), torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match=r"int8 linear: bias must have shape \[out\] = \[4\], got \[3\]"):
        torch.ops.mplug2_cpu.int8_finish(y, scales, torch.zeros(3), "none", None, out)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        torch.ops.mplug2_cpu.int8_finish(y, scales, None, "none", None, torch.zeros(4, 2).t())
