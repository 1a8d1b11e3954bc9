"""Reading of the golden cases under `--parity-dir`, and comparison with their results. No size is assumed anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mplug2.config import DecoderConfig, FusionConfig, ModelConfig, TextConfig, UniversalConfig, VisionConfig
from mplug2.weights.names import canonical, old_names
from mplug2.weights.released import load_state
from tolerances import PARITY

TAG = {torch.float32: "f32", torch.float64: "f64"}


class Case:
    """One golden case at one dtype: parameters, inputs and recorded results."""

    def __init__(self, folder: Path, name: str, dtype: torch.dtype):
        self.dtype, self.tag = dtype, TAG[dtype]
        self.json = json.loads((folder / f"{name}.json").read_text())
        self.tensors = load_file(folder / f"{name}.safetensors")

    def params(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Parameters by official name, with `prefix` in front, upcast from their exact half-precision storage."""
        names = [n for n in self.tensors if n.startswith("param.")]
        params = {prefix + n.removeprefix("param."): self.tensors[n].to(self.dtype) for n in names}
        for copy, owner in self.json.get("tied", {}).items():
            if prefix + owner in params:
                params[prefix + copy] = params[prefix + owner]
        return params

    def input(self, name: str) -> torch.Tensor:
        x = self.tensors[f"input.{name}"]
        return x.to(self.dtype) if x.is_floating_point() else x

    def mask(self, name: str) -> torch.Tensor:
        return self.input(name).bool()

    def expect(self, name: str, got: torch.Tensor, *, scale: float | None = None) -> None:
        """`got` equals the recorded `out.name` within the bound, relative to the largest entry (or to `scale`)."""
        self._close(f"out.{name}", got, self.tensors[f"{self.tag}.out.{name}"], scale)

    def expect_grads(self, grads: dict[str, torch.Tensor], *, group: str = "", norms: dict | None = None) -> None:
        """Gradients by official name against what is recorded of them: whole, 64 samples, or the norm."""
        norms = (self.json["grad_norms"] if norms is None else norms)[self.tag]
        checked = 0
        whole = {n: self.tensors.get(f"{self.tag}.grad.{group}{n}") for n in grads}
        parts = {n: self.tensors.get(f"{self.tag}.gradsub.{group}{n}") for n in grads}
        largest = (
            max(float(t.abs().max()) for t in (*whole.values(), *parts.values()) if t is not None)
            if any(t is not None for t in (*whole.values(), *parts.values()))
            else max(norms.values())
        )
        for name, grad in grads.items():
            if whole[name] is not None:
                self._close(f"grad.{name}", grad, whole[name], largest)
            if parts[name] is not None:
                index = (torch.arange(64) * grad.numel()) // 64
                self._close(f"gradsub.{name}", grad.flatten()[index], parts[name], largest)
            if name in norms:
                bound = PARITY[self.dtype] * max(norms.values())
                assert abs(float(grad.double().norm()) - norms[name]) <= bound, f"norm of grad.{name}"
                checked += 1
        assert checked == len(norms), f"gradients without a counterpart: {sorted(set(norms) - set(grads))[:5]}"

    def _close(self, name: str, got: torch.Tensor, want: torch.Tensor, scale: float | None) -> None:
        got = got.detach().reshape(want.shape) if got.numel() == want.numel() else got.detach()
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, recorded {tuple(want.shape)}"
        assert torch.isfinite(got).all(), f"{name}: not finite"
        scale = float(want.abs().max()) if scale is None else scale
        error = float((got.double() - want.double()).abs().max()) / max(scale, 1e-30)
        assert error <= PARITY[self.dtype], f"{name}: off by {error:.2e} of the largest entry"


def model_config(bert: dict, *, vision: VisionConfig | None = None, decoder_layers: int | None = None) -> ModelConfig:
    """Our configuration of a recorded BERT configuration (and vision tower)."""
    return ModelConfig(
        name="parity",
        vision=vision or VisionConfig(),
        text=TextConfig(
            vocab_size=bert["vocab_size"], width=bert["hidden_size"], num_heads=bert["num_attention_heads"],
            num_layers=max(bert["num_hidden_layers"] - bert["num_uni_layer"], 0), mlp_width=bert["intermediate_size"],
            max_positions=bert["max_position_embeddings"], num_token_types=bert["type_vocab_size"],
        ),
        universal=UniversalConfig(num_layers=bert["num_uni_layer"]),
        fusion=FusionConfig(num_layers=bert["fusion_layers"], stride_layer=bert["stride_layer"]),
        decoder=DecoderConfig(num_layers=decoder_layers or bert["text_decode_layers"]),
    )  # fmt: skip


class Holder(nn.Module):
    """A few modules under the names they have in `Parts`, so that the loader of released weights fills them."""

    def __init__(self, config: ModelConfig, **modules: nn.Module):
        super().__init__()
        self.config = config
        for name, module in modules.items():
            self.add_module(name, module)


def load(parts: nn.Module, params: dict[str, torch.Tensor], dtype: torch.dtype):
    """Parameters by official name into modules on the meta device, through the loader; returns its report."""
    parts.to(dtype)
    state = {canonical(name): value for name, value in params.items()}
    return load_state(parts, state, file="parity", device="cpu")


def official_grads(parts: nn.Module, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of our (packed) parameters, cut into the official ones and named as in `params`."""
    names = {canonical(name): name for name in params}
    start = max([int(n.split(".")[3]) for n in names if n.startswith("fusion_encoder.encoder.layer.")], default=0)
    start += 1 - parts.config.fusion.num_layers
    grads = {}
    for name, p in parts.named_parameters():
        if p.grad is None:
            continue
        row = 0
        for old in old_names(name, num_text_layers=parts.config.text.num_layers, fusion_start=start):
            shape = params[names[old]].shape
            grads[names[old]] = p.grad[row : row + shape[0]].reshape(shape)
            row += shape[0]
    return grads


def decoder_ends(config: ModelConfig, start_id: int, end_id: int) -> ModelConfig:
    """The configuration with other start and end tokens."""
    return replace(config, decoder=replace(config.decoder, start_id=start_id, end_id=end_id))
