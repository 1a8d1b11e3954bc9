"""compose builds what the table says, and only that."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mplug2
from mplug2.composition import COMPOSITIONS
from mplug2.config import PRESETS

CLASSES = replace(PRESETS["nano"], num_classes=3)
IDS = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0]])


def count(task, config="large"):
    parts = mplug2.compose(task, config, init=False)
    return sum(p.numel() for p in parts.parameters()) / 1e6


def test_parameter_counts_of_large():
    assert count("video-captioning") == pytest.approx(622, abs=1)
    assert count("video-qa") == pytest.approx(1032, abs=1)
    assert count(["video-captioning", "video-qa"]) == count("video-qa")


def test_parameter_counts_of_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for preset, digits in (("large", 0), ("base", 0), ("nano", 1)):
        caption, answer = (f"{count(task, preset):,.{digits}f} M" for task in ("video-captioning", "video-qa"))
        assert f"| `{preset}` | {caption} | {answer} |" in readme


def test_nano_is_small():
    tasks = PRESETS["nano"].tasks
    assert count(tasks, "nano") < 4
    assert 2 * count(tasks, "nano") <= 8.5  # MB in fp16


@pytest.mark.parametrize("task", COMPOSITIONS)
def test_every_row_builds_its_modules_and_trains_all_of_them(task):
    row = COMPOSITIONS[task]
    torch.manual_seed(0)
    parts = mplug2.compose(task, CLASSES)
    assert (parts.vision is not None) == bool(row.vision)
    assert (parts.text is not None) == bool(row.text)
    assert (parts.fusion is not None) == row.fusion
    assert (parts.decoder is not None) == row.decoder
    assert set(parts.heads) == set(row.heads)
    size = (2, 2, 3, 1, 64, 64) if row.vision == "images" else (2, 3, 1, 64, 64)
    inputs = {"video": torch.randn(size)} if row.vision else {}
    inputs |= {"text": IDS} if row.text else {}
    if row.decoder:
        inputs["labels"] = IDS
    elif any(head.endswith("classes") for head in row.heads):
        inputs["labels"] = torch.tensor([0, 2])
    out = parts(**inputs)
    terms = [t for t in (out.loss, out.logits, *out.embeddings.values()) if t is not None]
    sum(t.float().pow(2).sum() for t in terms).backward()
    untouched = {name for name, p in parts.named_parameters() if p.grad is None}
    # The forward gives these no loss: heads of pre-training beyond the decoder, and the temperature.
    allowed = {"heads.contrastive.temperature"} if "contrastive" in row.heads else set()
    if task == "pretraining":
        allowed = {name for name in untouched if name.startswith("heads.")}
    assert untouched == allowed


def test_captioning_with_an_instruction_reads_it():
    parts = mplug2.compose("video-captioning", "nano", instruction=True)
    assert parts.text is not None
    assert parts.fusion is not None
    out = parts(video=torch.randn(2, 3, 1, 64, 64), text=IDS, labels=IDS)
    assert out.loss.isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mplug2.compose("captioning", "nano"), "unknown task 'captioning'; tasks are video-captioning"),
        (lambda: mplug2.compose([], "nano"), "at least one task"),
        (lambda: mplug2.compose("video-qa", "huge"), "huge: neither a preset"),
        (lambda: mplug2.compose("video-classification", "nano"), "needs config.num_classes > 0"),
        (lambda: mplug2.compose("video-qa", "nano")(video=torch.zeros(1, 3, 1, 64, 64), labels=IDS), "needs text"),
        (
            lambda: mplug2.compose("video-captioning", "nano").encode_vision(torch.zeros(1, 3, 1, 32, 64)),
            r"\(B, 3, T, 64, 64\)",
        ),
        (lambda: mplug2.compose("text-generation", "nano").context(video=torch.zeros(1), text=IDS), "takes no video"),
        (lambda: mplug2.compose("feature-extraction", "nano").context(text=IDS), "has no decoder"),
        (
            lambda: mplug2.compose(["video-qa", "visual-qa"], "nano")(text=IDS),
            "task must be one of video-qa, visual-qa",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_label_counts_repeat_the_context_of_their_item():
    torch.manual_seed(1)
    parts = mplug2.compose("video-captioning", "nano").double()
    video = torch.randn(2, 3, 2, 64, 64, dtype=torch.float64)
    labels = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0], [2, 11, 5, 6, 3]])
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    with torch.no_grad():
        loss = parts(video=video, labels=labels, label_counts=torch.tensor([1, 2]), label_weights=weights).loss
        each = [
            parts(video=video[i : i + 1], labels=labels[r : r + 1], label_weights=weights[r : r + 1]).loss
            for i, r in ((0, 0), (1, 1), (1, 2))
        ]
    assert loss.item() == pytest.approx(sum(each).item() / 2, rel=1e-12)


def test_figure_mode_has_no_attention_among_all_visual_tokens():
    config = replace(PRESETS["nano"], universal=replace(PRESETS["nano"].universal, mode="figure"))
    torch.manual_seed(0)
    parts = mplug2.compose("video-captioning", config).double()
    video = torch.randn(1, 3, 2, 64, 64, dtype=torch.float64)
    v = parts.vision(video)
    queries = parts.universal.queries.expand(1, -1, -1)
    for layer in parts.universal.layers:
        queries = layer(queries, context=layer.cross_attention.project(v))
    read = parts.universal.read_out(v, parts.universal.read_out.project(queries))
    assert torch.equal(parts.encode_vision(video), parts.universal.norm(v + read))


def test_table_lists_every_task():
    table = mplug2.composition_table()
    assert all(f"| `{task}` |" in table for task in COMPOSITIONS)


def test_readme_shows_the_table_of_the_code():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert mplug2.composition_table() in readme
