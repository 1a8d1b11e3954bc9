"""Loading and saving: released checkpoints with all their names, our own folders, bad files, memory."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import mplug2
from mplug2.config import PRESETS
from mplug2.weights import WeightsError, load_folder, load_released, save_folder
from mplug2.weights.load import resize_positions
from mplug2.weights.names import canonical, old_names
from parity_case import Case

TINY = PRESETS["nano"]


def official_file(parity_dir, task, path, *, rename=lambda name: name, wrap="model", drop=()):
    """A checkpoint with every official name and shape of the large model; each tensor stores one element."""
    kind = "vqa" if task == "video-qa" else "caption"
    keys = json.loads((parity_dir / f"official_large_{kind}_keys.json").read_text())
    state = {rename(name): torch.zeros(()).expand(shape) for name, shape in keys.items() if name not in drop}
    torch.save({wrap: state} if wrap else state, path)
    return state


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return mplug2.compose(["video-captioning", "video-qa"], TINY)


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) + "\n")
    return path


@pytest.mark.parametrize("task", ["video-captioning", "video-qa"])
@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "prefixed"])
def test_official_names_load_with_nothing_missing(parity_dir, tmp_path, task, prefixed):
    def rename(name):
        if not prefixed:
            return name
        name = re.sub(r"^(text_encoder)\.", r"\1.bert.", name)
        return "module." + re.sub(r"^(fusion_encoder)\.", r"\1.fusion.", name)

    path = tmp_path / "released.pth"
    state = official_file(parity_dir, task, path, rename=rename, wrap="module" if prefixed else "model")
    parts = mplug2.compose(task, "large", init=False, dtype=torch.bfloat16)
    report = load_released(parts, path, device="meta")
    assert not report.missing
    assert not report.resized
    assert len(report.used) + len(report.ignored) == len(state)
    # What is left over is what nothing computes with: see docs/differences.md, "Dead weight".
    dead = [
        r"visual_encoder\.(?!visual\.)", r"visual_encoder\.visual\.proj$", r".*position_ids$", r".*_vision\.",
        r"text_decoder\.cls\.predictions\.decoder", r"text_decoder\..*latents$", r"fusion_encoder\.embeddings",
        r"fusion_encoder\.encoder\.layer\.(\d|1[0-7])\.", r"\w+_m\.",
    ]  # fmt: skip
    if task == "video-captioning":
        dead += [r"fusion_encoder", r"text_encoder\.(embeddings|encoder\.layer\.(\d|1\d|2[01])\.)"]
    assert [name for name in map(canonical, report.ignored) if not re.match("|".join(dead), name)] == []


def test_key_variants_of_the_reference(parity_dir):
    case = json.loads((parity_dir / "checkpoint_keys.json").read_text())
    names = {canonical(name) for name in case["before"]}
    ours = mplug2.compose(["video-captioning", "video-qa"], "large", init=False)
    known = {old for n, _ in ours.named_parameters() for old in old_names(n, num_text_layers=22, fusion_start=18)}
    known |= {old for n, _ in ours.named_parameters() for old in old_names(n, num_text_layers=22, fusion_start=0)}
    # The reference drops the fusion keys without a prefix; here every variant is known.
    assert names <= known


def test_position_tables_are_resized_as_in_the_reference(parity_dir):
    for dtype in (torch.float32, torch.float64):
        case = Case(parity_dir, "pos_embed", dtype)
        for i, size in enumerate(case.json["sizes"]):
            case.expect(f"pos{i}", resize_positions(case.input(f"pos{i}")[0], 1 + size["new_grid"] ** 2))


def test_another_image_size_is_reported(parity_dir, tmp_path):
    path = tmp_path / "released.pth"
    official_file(parity_dir, "video-captioning", path)
    config = replace(PRESETS["large"], vision=replace(PRESETS["large"].vision, image_size=336))
    parts = mplug2.compose("video-captioning", config, init=False, dtype=torch.bfloat16)
    report = load_released(parts, path, device="meta")
    assert report.resized == ("vision.position_embedding",)
    assert parts.vision.position_embedding.shape == (1 + 24**2, 1024)


def test_missing_weights_are_an_error_unless_allowed(parity_dir, tmp_path):
    path = tmp_path / "released.pth"
    lost = "text_decoder.cls.predictions.bias"
    official_file(parity_dir, "video-captioning", path, drop=[lost, "text_decoder.cls.predictions.decoder.bias"])
    parts = mplug2.compose("video-captioning", "large", init=False, dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match=r"released\.pth: lacks 1 of .* \(decoder\.head\.bias\)"):
        load_released(parts, path)
    assert all(p.is_meta for p in parts.parameters()), "a failed load must not leave a half-filled model"
    report = load_released(parts, path, device="meta", allow_missing=True)
    assert report.missing == ("decoder.head.bias",)


def test_wrong_shape_names_tensor_and_file(parity_dir, tmp_path):
    path = tmp_path / "released.pth"
    official_file(parity_dir, "video-captioning", path)
    config = replace(PRESETS["large"], text=replace(PRESETS["large"].text, vocab_size=100))
    parts = mplug2.compose("video-captioning", config, init=False)
    shapes = r"has shape \[100, 1024\] in the model but \[30522, 1024\] in the file"
    with pytest.raises(WeightsError, match=r"released\.pth: decoder\.embeddings\.word\.weight " + shapes):
        load_released(parts, path, device="meta")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "kind", ["absent", "empty", "text", "truncated", "pickle", "hostile", "no tensors", "integers"]
)
def test_bad_checkpoint_is_one_clear_error(tmp_path, monkeypatch, parity_dir, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        official_file(parity_dir, "video-captioning", path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": Hostile()}))
    elif kind == "hostile":
        torch.save({"model": {"a": torch.zeros(1)}, "config": Hostile()}, path)
    elif kind == "no tensors":
        torch.save({"epoch": 3}, path)
    elif kind == "integers":
        state = official_file(parity_dir, "video-captioning", path)
        torch.save({n: torch.zeros((), dtype=torch.int64).expand(t.shape) for n, t in state.items()}, path)
    before = set(tmp_path.iterdir())
    parts = mplug2.compose("video-captioning", "large", init=False)
    with pytest.raises(WeightsError) as error:
        load_released(parts, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) == before, "reading wrote something"


def test_folder_round_trip(tiny, vocab, tmp_path):
    folder = tmp_path / "model"
    save_folder(tiny, vocab, folder)
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in folder.iterdir()), "others may read a shared model"
    copy = mplug2.compose(["video-captioning", "video-qa"], folder, init=False)
    report = load_folder(copy, folder)
    assert not report.missing
    assert not report.ignored
    assert copy.text.embeddings.word is copy.decoder.embeddings.word
    for (name, a), (_, b) in zip(tiny.named_parameters(), copy.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    (folder / "notes.txt").write_text("mine")
    save_folder(tiny, vocab, folder)  # replaces its own files alone
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "words.txt"]


def test_one_task_of_a_folder_ignores_the_rest(tiny, vocab, tmp_path):
    save_folder(tiny, vocab, tmp_path / "model")
    parts = mplug2.compose("video-captioning", TINY, init=False)
    report = load_folder(parts, tmp_path / "model")
    # The shared word table lies under the text encoder's name: without one, the decoder still finds it.
    assert not report.missing
    assert any(name.startswith("fusion.") for name in report.ignored)


def test_saving_never_overwrites_what_is_not_a_model(tiny, vocab, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    with pytest.raises(ValueError, match="exists and is not a model folder"):
        save_folder(tiny, vocab, tmp_path / "photos")


def test_failed_save_leaves_nothing(tiny, tmp_path):
    with pytest.raises(FileNotFoundError):
        save_folder(tiny, tmp_path / "absent.txt", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["absent", "truncated", "lying", "text"])
def test_bad_folder_is_one_clear_error(tiny, vocab, tmp_path, kind):
    folder = tmp_path / "model"
    save_folder(tiny, vocab, folder)
    file = folder / "model.safetensors"
    if kind == "absent":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "lying":
        file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    else:
        file.write_text("hello")
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load_folder(mplug2.compose("video-captioning", TINY, init=False), folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"nam": "x"}', "unknown field 'nam'"),
        ('{"vision": {"width": "big"}}', "width must be int"),
        ('{"vision": {"num_heads": 5}}', "num_heads must divide width"),
        ('{"vision": {"patch_size": 15}}', "must divide image_size"),
        ('{"vision": {"num_local_temporal": 5}}', "num_local_temporal must be 0, 1 or 2"),
        ('{"fusion": {"stride_layer": 0}}', "stride_layer must be at least 1"),
        ('{"universal": {"mode": "fig"}}', "mode must be"),
    ],
)
def test_bad_config_names_file_and_field(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        mplug2.create_model(tmp_path, random_weights=True)
    assert "config.json" in str(error.value)


def test_config_round_trip():
    for config in PRESETS.values():
        assert mplug2.ModelConfig.from_json(config.to_json()) == config


PEAK = """
import sys, threading, time, torch, mplug2
from mplug2.weights import load_released

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024

start = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.02)
thread = threading.Thread(target=watch); thread.start()
parts = mplug2.compose("video-captioning", "base", init=False)
load_released(parts, sys.argv[1])
peak = max(peak, anonymous())
done = True; thread.join()
size = sum(p.numel() * p.element_size() for p in parts.parameters())
print((peak - start) / size)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's memory accounting")
def test_loading_holds_no_second_copy(tmp_path):
    parts = mplug2.compose("video-captioning", "base", init=False)
    state = {}
    for name, p in parts.named_parameters():
        names = old_names(name, num_text_layers=parts.config.text.num_layers, fusion_start=0)
        for old, piece in zip(names, torch.zeros(p.shape).chunk(len(names)), strict=True):
            state[old] = piece.clone()
    path = tmp_path / "base.pth"
    torch.save({"model": state}, path)
    del state
    run = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.3


def test_unequal_pieces_of_a_packed_projection_are_refused(parity_dir, tmp_path):
    path = tmp_path / "released.pth"
    keys = json.loads((parity_dir / "official_large_caption_keys.json").read_text())
    name = "text_decoder.bert.encoder.layer.0.attention.self."
    keys |= {name + "query.weight": [1536, 1024], name + "key.weight": [512, 1024]}
    torch.save({"model": {n: torch.zeros(()).expand(shape) for n, shape in keys.items()}}, path)
    parts = mplug2.compose("video-captioning", "large", init=False)
    with pytest.raises(WeightsError, match=r"decoder\.layers\.0\.self_attention\.qkv\.weight"):
        load_released(parts, path, device="meta")


def test_folder_with_other_tensors_lacks_the_model(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="lacks"):
        load_folder(mplug2.compose("video-captioning", TINY, init=False), tmp_path)
