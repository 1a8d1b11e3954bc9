"""CLIP into the vision tower: state dict, safetensors, TorchScript archive; and the tower against `transformers`."""

import io
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mplug2
from mplug2.config import ModelConfig, TextConfig, UniversalConfig, VisionConfig
from mplug2.weights import WeightsError, load_clip
from mplug2.weights.load import inflate_patches
from parity_case import Case
from tolerances import PARITY

VISION = {"width": 32, "num_layers": 2, "num_heads": 4, "mlp_width": 64, "image_size": 24, "patch_size": 8}


def config(**vision):
    return ModelConfig(
        name="tiny",
        vision=VisionConfig(**{**VISION, **vision}),
        text=TextConfig(vocab_size=40, width=48, num_layers=1, num_heads=4, mlp_width=64, max_positions=16),
        universal=UniversalConfig(num_queries=4),
    )


def build(dtype=torch.float32, **vision):
    torch.manual_seed(1)
    return mplug2.compose("feature-extraction", config(**vision), dtype=dtype)


def clip_state(*, width=32, layers=2, patch=8, grid=3, mlp=64):
    """A state dict as OpenAI's CLIP names it, with a little of what belongs to its text tower."""
    shapes = {
        "visual.class_embedding": (width,), "visual.positional_embedding": (1 + grid**2, width),
        "visual.proj": (width, 16), "visual.conv1.weight": (width, 3, patch, patch), "text_projection": (16, 16),
        "transformer.resblocks.0.attn.in_proj_weight": (48, 16),
    }  # fmt: skip
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (width,), f"visual.{norm}.bias": (width,)}
    for i in range(layers):
        block = f"visual.transformer.resblocks.{i}."
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        matrices = {"attn.out_proj": (width, width), "mlp.c_fc": (mlp, width), "mlp.c_proj": (width, mlp)}
        for name, shape in (matrices | {"ln_1": (width,), "ln_2": (width,)}).items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {"input_resolution": torch.tensor(patch * grid)}


def save_torchscript(state, path):
    """The state as a scripted module of the same tree, in half precision as it was published."""

    class Node(nn.Module):
        def forward(self, x: int) -> int:
            return x

    root = Node()
    for name, value in state.items():
        *path_in, kind = name.split(".")
        node = root
        for part in path_in:
            if not hasattr(node, part):
                node.add_module(part, Node())
            node = getattr(node, part)
        if value.is_floating_point():
            node.register_parameter(kind, nn.Parameter(value.half()))
        else:
            node.register_buffer(kind, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(root), path)


def rewrite(path, change):
    """The zip file with every record passed through change(name, bytes) -> bytes or None (left out)."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, raw in records.items():
            if (changed := change(name.partition("/")[2], raw)) is not None:
                new.writestr(name, changed)


def test_patches_are_inflated_as_in_the_reference(parity_dir):
    case = Case(parity_dir, "pos_embed", torch.float32)
    for depth in (1, 3):
        got = inflate_patches(case.input("weight_2d"), depth)
        assert torch.equal(got.float(), case.tensors[f"out.inflate_t{depth}_center"])


@pytest.mark.parametrize("kind", ["pt", "wrapped", "safetensors", "torchscript"])
def test_only_the_tower_is_filled(tmp_path, kind):
    state = clip_state()
    path = tmp_path / f"clip.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "torchscript":
        save_torchscript(state, path)
    elif kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if kind == "pt" else {"state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    parts = build()
    before = {name: p.clone() for name, p in parts.named_parameters()}
    identity = dict(parts.named_parameters())
    report = load_clip(parts, path)
    after = dict(parts.named_parameters())
    assert all(after[name] is p for name, p in identity.items()), "an optimizer may hold the parameters already"
    filled = {name for name in before if name.startswith("vision.")}
    filled -= {name for name in before if "local_temporal" in name or "projection" in name}
    assert {name for name, p in before.items() if not torch.equal(p, after[name])} == filled
    assert set(report.missing) == set(before) - filled
    assert report.resized == ()
    assert sorted(report.used) == sorted(n for n in state if n.startswith("visual.") and n != "visual.proj")
    left = {"visual.proj", "text_projection", "transformer.resblocks.0.attn.in_proj_weight", "input_resolution"}
    assert set(report.ignored) == left
    block = after["vision.blocks.1.attention.qkv.weight"]
    want = state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    torch.testing.assert_close(block, want.half().float() if kind == "torchscript" else want, rtol=0, atol=0)


def test_a_clip_of_pictures_starts_a_model_of_videos(tmp_path):
    torch.save(clip_state(), tmp_path / "clip.pt")
    parts, still = build(temporal_stride=1), build()
    load_clip(parts, tmp_path / "clip.pt")
    load_clip(still, tmp_path / "clip.pt")
    parts.vision.projection = still.vision.projection = None  # each at its own random start
    # Patches see their middle frame alone, and the temporal modules are the identity: frames are seen one by one.
    video = torch.randn(2, 3, 4, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(parts.vision(video), still.vision(video))


def test_another_grid_is_resized_and_reported(tmp_path):
    torch.save(clip_state(), tmp_path / "clip.pt")
    parts = build(image_size=40)
    assert load_clip(parts, tmp_path / "clip.pt").resized == ("vision.position_embedding",)
    assert parts.vision.position_embedding.shape == (26, 32)
    assert parts.vision.position_embedding.abs().sum() > 0  # the reference starts with a table of zeros


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"num_layers": 3}, r"clip\.pt: lacks 12 of the tensors .* \(visual\.transformer\.resblocks\.2\."),
        ({"mlp_width": 96}, r"clip\.pt: vision\.blocks\.0\.mlp\.up\.weight has shape \[96, 32\] .* \[64, 32\]"),
        ({"patch_size": 12}, r"clip\.pt: vision\.patch_embedding\.weight has shape"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, vision, message):
    torch.save(clip_state(), tmp_path / "clip.pt")
    parts = build(**vision)
    before = {name: p.clone() for name, p in parts.named_parameters()}
    with pytest.raises(WeightsError, match=message):
        load_clip(parts, tmp_path / "clip.pt")
    assert all(torch.equal(p, before[name]) for name, p in parts.named_parameters())


def test_parts_without_values_or_without_tower(tmp_path):
    torch.save(clip_state(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="the model has no values yet"):
        load_clip(mplug2.compose("feature-extraction", config(), init=False), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="no part that such weights could start"):
        load_clip(mplug2.compose("text-generation", config()), tmp_path / "clip.pt")


def test_an_archive_is_read_without_its_program(tmp_path):
    path = tmp_path / "clip.pt"
    save_torchscript(clip_state(), path)
    rewrite(path, lambda name, raw: None if name.startswith("code/") else raw)
    assert load_clip(build(), path).used


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("kind", ["hostile", "truncated", "no tree", "short", "lost record", "compressed", "noise"])
def test_bad_archive_is_one_clear_error(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "clip.pt"
    state = clip_state()
    save_torchscript(state, path)
    if kind == "hostile":
        rewrite(path, lambda name, raw: pickle.dumps(Hostile()) if name == "data.pkl" else raw)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "no tree":
        rewrite(path, lambda name, raw: None if name == "data.pkl" else raw)
    elif kind == "noise":
        rewrite(path, lambda name, raw: b"\x80\x02garbage." if name == "data.pkl" else raw)
    elif kind == "short":
        rewrite(path, lambda name, raw: raw[:2] if name.startswith("data/") else raw)
    elif kind == "lost record":
        rewrite(path, lambda name, raw: None if name.startswith("data/") else raw)
    else:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"clip\.pt: ") as error:
        load_clip(build(), path)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.pt"]


def openai_names(state):
    """A state dict of `transformers`' CLIP vision model under the names of OpenAI's."""
    named = {
        "visual.class_embedding": state["embeddings.class_embedding"],
        "visual.conv1.weight": state["embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        named[f"visual.ln_pre.{kind}"] = state[f"pre_layrnorm.{kind}"]
        named[f"visual.ln_post.{kind}"] = state[f"post_layernorm.{kind}"]
        for i in range(1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.layers."))):
            theirs, ours = f"encoder.layers.{i}.", f"visual.transformer.resblocks.{i}."
            packed = [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            named[f"{ours}attn.in_proj_{kind}"] = torch.cat(packed)
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                named[f"{ours}{b}.{kind}"] = state[f"{theirs}{a}.{kind}"]
    return named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tower_without_temporal_modules_equals_transformers(tmp_path, dtype):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'mplug2[oracle]'")
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=24,
            patch_size=8,
        )
    )
    theirs = getattr(theirs, "vision_model", theirs).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (1.0 if p.dim() == 1 else 0.0))
    torch.save(openai_names(dict(theirs.state_dict())), tmp_path / "clip.pt")

    parts = build(dtype, num_layers=3, num_local_temporal=0)
    load_clip(parts, tmp_path / "clip.pt")
    pixels = torch.randn(2, 3, 24, 24, generator=generator).to(dtype)
    with torch.no_grad():
        states = theirs(pixels).last_hidden_state
        want = theirs.post_layernorm(states)
        tower = parts.vision
        x = tower.embed(pixels[:, :, None])
        for block in tower.blocks:
            x = block(x)
        tower.projection = None
        got = tower(pixels[:, :, None])
    for a, b in ((x[:, 0], states), (got, want)):
        assert float((a - b).abs().max() / b.abs().max()) <= PARITY[dtype]
