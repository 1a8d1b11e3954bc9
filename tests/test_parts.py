"""What training code does to modules: compile, export, recompute, copy, cast."""

import copy

import pytest
import torch

import mplug2
from mplug2.modules import VisionEncoder

LABELS = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0]])
QUESTION = torch.tensor([[2, 5, 6, 0], [2, 7, 0, 0]])


@pytest.fixture
def parts():
    torch.manual_seed(0)
    made = mplug2.compose("video-qa", "nano")
    for module in made.modules():  # local temporal modules start as the identity: let them do something
        if hasattr(module, "up") and hasattr(module, "conv"):
            torch.nn.init.normal_(module.up.weight, std=0.1)
    return made


@pytest.fixture
def batch():
    return {"video": torch.randn(2, 3, 3, 64, 64), "text": QUESTION, "labels": LABELS}


def gradients(parts, loss):
    parts.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in parts.named_parameters()}


def close(got, want):
    scale = max(float(g.abs().max()) for g in want.values())
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= 2e-5 * scale, name


def test_compiles_whole_in_training(parts, batch):
    want = gradients(parts, parts(**batch).loss)
    compiled = torch.compile(parts, fullgraph=True, backend="aot_eager")
    close(gradients(parts, compiled(**batch).loss), want)


def test_recomputed_activations_give_the_same_gradients(parts, batch):
    want = gradients(parts, parts(**batch).loss)
    parts.set_grad_checkpointing()
    close(gradients(parts, parts(**batch).loss), want)
    parts.set_grad_checkpointing(False)
    assert not any(getattr(m, "recompute", False) for m in parts.modules())


def test_vision_encoder_exports(parts, batch):
    class Visual(torch.nn.Module):
        def __init__(self, vision: VisionEncoder):
            super().__init__()
            self.vision = vision

        def forward(self, video):
            return self.vision(video)

    program = torch.export.export(Visual(parts.vision).eval(), (batch["video"],))
    with torch.no_grad():
        want = parts.vision(batch["video"])
        assert torch.allclose(program.module()(batch["video"]), want, atol=1e-5)


def test_copies_are_independent_and_keep_their_ties(parts, batch):
    twin = copy.deepcopy(parts)
    assert twin.decoder.embeddings.word is twin.text.embeddings.word
    assert twin.decoder.embeddings.word is not parts.decoder.embeddings.word
    twin.load_state_dict(parts.state_dict())
    assert torch.equal(twin(**batch).loss, parts(**batch).loss)


def test_autocast_and_half_agree_with_float32(parts, batch):
    want = parts(**batch).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = parts(**batch).loss
    assert loss.item() == pytest.approx(want, rel=0.02)
    assert all(g.isfinite().all() for g in gradients(parts, loss).values())
    half = copy.deepcopy(parts).bfloat16()
    assert half(**{**batch, "video": batch["video"].bfloat16()}).loss.item() == pytest.approx(want, rel=0.02)
