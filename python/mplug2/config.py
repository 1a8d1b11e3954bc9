"""Frozen configurations of the modules, the presets, and their JSON form.

Every size is explicit. The language side (text encoder, universal layers, fusion, decoder) shares the width, the number
of heads and the MLP width of `TextConfig`; each of its modules adds only what is its own.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class VisionConfig:
    """Dual-vision encoder: a ViT whose blocks hold local temporal modules; an image is a video of one frame."""

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_width: int = 4096
    image_size: int = 224  # pixels, square
    patch_size: int = 14
    patch_stride: int | None = None  # None: patches do not overlap
    num_frames: int = 16  # frames that reading samples from a video; any number of frames can be encoded
    num_local_temporal: int = 2  # modules per block: 2 in the released code, 1 in the paper's figure, 0 for a plain ViT
    temporal_stride: int | None = None  # None: patches are one frame deep; else 3 frames deep with this stride in time
    resize: str = "nearest"  # how frames reach image_size: "nearest" (released) or "area"

    def __post_init__(self):
        _divides("vision.num_heads", self.num_heads, "width", self.width)
        stride = self.patch_stride or self.patch_size
        _divides("vision.patch_stride or patch_size", stride, "image_size", self.image_size)
        if stride > self.patch_size or (self.patch_size - stride) % 2:
            raise ValueError(f"vision.patch_stride must be patch_size less an even number, got {stride}")
        if self.num_local_temporal not in (0, 1, 2):
            raise ValueError(f"vision.num_local_temporal must be 0, 1 or 2, got {self.num_local_temporal}")
        if self.temporal_stride is not None and self.temporal_stride < 1:
            raise ValueError(f"vision.temporal_stride must be at least 1 or None, got {self.temporal_stride}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of a frame. Overlapping patches are padded so that the grid is image_size / stride."""
        return self.image_size // (self.patch_stride or self.patch_size)

    @property
    def tokens_per_frame(self) -> int:
        return 1 + self.grid_size**2


@dataclass(frozen=True)
class TextConfig:
    """Text encoder below the universal layers, and the sizes shared by all language modules (post-norm BERT)."""

    vocab_size: int = 30522
    width: int = 1024
    num_layers: int = 22  # own layers; the universal layers follow
    num_heads: int = 16
    mlp_width: int = 4096
    max_positions: int = 512
    num_token_types: int = 2

    def __post_init__(self):
        _divides("text.num_heads", self.num_heads, "width", self.width)


@dataclass(frozen=True)
class UniversalConfig:
    """Layers shared by text and vision, with learned queries on the vision side.

    mode "released": the last layer lets the visual tokens attend to each other and to the queries (released weights).
    mode "figure": queries pass through all layers, then one read-out cross-attention adds them to the tokens.
    """

    num_layers: int = 2
    num_queries: int = 50
    mode: str = "released"

    def __post_init__(self):
        if self.mode not in ("released", "figure"):
            raise ValueError(f"universal.mode must be 'released' or 'figure', got {self.mode!r}")
        if self.num_layers < 1:
            raise ValueError(f"universal.num_layers must be at least 1, got {self.num_layers}")


@dataclass(frozen=True)
class FusionConfig:
    """Text queries that attend to vision. Every stride_layer-th layer (from 0, never the first) is a joint layer."""

    num_layers: int = 6
    stride_layer: int = 1000

    def __post_init__(self):
        if self.stride_layer < 1:
            raise ValueError(f"fusion.stride_layer must be at least 1, got {self.stride_layer}")


@dataclass(frozen=True)
class DecoderConfig:
    """Shared decoder: causal self-attention, cross-attention, feed-forward; LM head tied to its word embeddings."""

    num_layers: int = 12
    start_id: int = 101  # [CLS]
    end_id: int = 102  # [SEP]


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: module sizes, the tasks it was trained for, and how captions are prompted."""

    name: str = "large"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    universal: UniversalConfig = field(default_factory=UniversalConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    share_embeddings: bool = False  # one word table for text encoder and decoder
    dropout: float = 0.0  # hidden dropout of the language modules; attention has none
    num_classes: int = 0  # of class heads
    tasks: tuple[str, ...] = ("video-captioning",)
    instruction: bool = False  # captioning also reads an instruction, through text encoder and fusion
    prompt: str = "a video of"  # the released captioner writes it itself; it is stripped from results

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "config") -> ModelConfig:
        """Read what `to_json` wrote; fields left out have their defaults, and unknown ones, wrong types and impossible
        sizes are a ValueError naming `source`."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f"{source}: not valid JSON: {e}") from None
        return _build(cls, raw, source)


def _build(cls, raw, where: str):
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected an object, got {type(raw).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(raw) - set(fields)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known fields are {', '.join(sorted(fields))}")
    values = {}
    for name, value in raw.items():
        nested = _NESTED.get(fields[name].type)
        if nested is not None:
            values[name] = _build(nested, value, f"{where}: {name}")
        elif fields[name].type == "tuple[str, ...]":
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"{where}: {name} must be a list of strings, got {value!r}")
            values[name] = tuple(value)
        elif not _fits(value, fields[name].type):
            raise ValueError(f"{where}: {name} must be {fields[name].type}, got {value!r}")
        else:
            values[name] = float(value) if fields[name].type == "float" else value
    try:
        return cls(**values)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def _divides(name: str, divisor: int, of: str, number: int) -> None:
    if divisor < 1 or number < 1 or number % divisor:
        raise ValueError(f"{name} must divide {of} = {number}, got {divisor}")


def _fits(value, kind: str) -> bool:
    options = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    return any(
        isinstance(value, options[k]) and (k == "bool" or not isinstance(value, bool)) for k in kind.split(" | ")
    )


_NESTED = {c.__name__: c for c in (VisionConfig, TextConfig, UniversalConfig, FusionConfig, DecoderConfig)}

PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(
        name="nano",
        vision=VisionConfig(
            width=128, num_layers=4, num_heads=4, mlp_width=512, image_size=64, patch_size=16, patch_stride=8,
            num_frames=8, resize="area",
        ),
        text=TextConfig(vocab_size=2048, width=128, num_layers=1, num_heads=4, mlp_width=512, max_positions=64),
        universal=UniversalConfig(num_queries=8),
        fusion=FusionConfig(num_layers=1),
        decoder=DecoderConfig(num_layers=2, start_id=2, end_id=3),
        share_embeddings=True,
        tasks=("video-captioning", "image-captioning", "video-qa", "visual-qa"),
        prompt="",
    ),
    "base": ModelConfig(
        name="base",
        vision=VisionConfig(width=768, num_layers=12, num_heads=12, mlp_width=3072, patch_size=16),
        text=TextConfig(width=768, num_layers=10, num_heads=12, mlp_width=3072),
        fusion=FusionConfig(num_layers=3),
    ),
    "large": ModelConfig(name="large"),
}  # fmt: skip


def get_config(config: str | Path | ModelConfig) -> ModelConfig:
    """A preset's name, a folder with config.json, a config.json, or a ModelConfig itself."""
    if isinstance(config, ModelConfig):
        return config
    if str(config) in PRESETS:
        return PRESETS[str(config)]
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{config}: neither a preset ({', '.join(PRESETS)}) nor a folder with config.json")
    return ModelConfig.from_json(path.read_text(), source=str(path))
