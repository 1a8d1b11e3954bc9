"""benchmarks/baselines against the engine, in float64: the same encoder, captions and ranking; and what the benchmarks
of both check and draw."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mplug2.composition import compose
from mplug2.config import DecoderConfig, ModelConfig, TextConfig, UniversalConfig, VisionConfig
from mplug2.generation import beam_search, rank_answers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import baselines
import bench_ranking
import generation_cases as cases

END = 3


@pytest.fixture(params=[16, 32], ids=["projected", "one width"])
def parts(request):
    """Small random parts whose vision is narrower than the decoder, or as wide."""
    torch.manual_seed(0)
    config = ModelConfig(
        vision=VisionConfig(request.param, num_layers=2, num_heads=2, mlp_width=32, image_size=8, patch_size=4),
        text=TextConfig(vocab_size=23, width=32, num_layers=1, num_heads=2, mlp_width=48, max_positions=16),
        universal=UniversalConfig(num_queries=3),
        decoder=DecoderConfig(num_layers=2, start_id=2, end_id=END),
        dropout=0.0,
    )
    made = compose("video-captioning", config, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.6)
        for p in (made.decoder.head.norm.weight, made.decoder.head.norm.bias, made.decoder.head.bias):
            p.mul_(0.2)
        made.decoder.head.bias[END] = 3.0
    return made


@pytest.fixture
def video(parts):
    return torch.randn(6, 3, 3, 8, 8, dtype=torch.float64)


@torch.no_grad()
def test_encoder(parts, video):
    expected = parts.encode_vision(video)
    torch.testing.assert_close(baselines.PublishedEncoder(parts)(video), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shortest", "longest"), [(1, 8), (5, 5), (0, 12)])
@torch.no_grad()
def test_captions(parts, video, shortest, longest):
    tokens = parts.encode_vision(video)
    options = {"beam_size": 4, "min_length": shortest, "max_length": longest}
    expected = beam_search(parts.decoder, parts.decoder.project(tokens), num_return=4, **options)
    decoder, rows = baselines.PublishedDecoder(parts.decoder), []
    decoder.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    found = baselines.beam_search(decoder, tokens, **options)
    assert [[h.ids for h in item] for item in found] == [[h.ids for h in item] for item in expected]
    for item, others in zip(found, expected, strict=True):
        assert [h.score for h in item] == pytest.approx([h.score for h in others], rel=1e-10)
    if shortest < longest:
        assert len(set(rows)) > 1, "all items end together"


@pytest.mark.parametrize("num_return", [1, 5, 9])
@torch.no_grad()
def test_ranking(parts, video, num_return):
    tokens = parts.encode_vision(video)
    answers = torch.randint(4, 23, (9, 5))
    answers[:, 0] = 2
    for row, length in zip(answers, [2, 3, 4] * 3, strict=True):
        row[length], row[length + 1 :] = END, 0
    expected = rank_answers(parts.decoder, parts.decoder.project(tokens), answers, num_return=num_return)
    found = baselines.rank_answers(baselines.PublishedDecoder(parts.decoder), tokens, answers, num_return=num_return)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=0)


def test_answers_to_rank_are_short_differ_and_share_their_beginnings():
    model = cases.make_model("nano", "float32", "cpu")
    rows = [tuple(row[row != 0].tolist()) for row in bench_ranking.make_answers(model)]
    assert len(set(rows)) == 128
    assert {len(row) for row in rows} == {3, 4, 5, 6}
    assert all((row[0], row[-1]) == (model.tokenizer.start_id, model.tokenizer.end_id) for row in rows)
    assert not {piece for row in rows for piece in row[1:-1]} & model.tokenizer.special_ids
    assert len({row[1] for row in rows}) <= 24


@torch.no_grad()
def test_what_differs_is_not_timed(parts, video):
    tokens = parts.encode_vision(video)
    (best,), *_ = beam_search(parts.decoder, parts.decoder.project(tokens[:1]), max_length=6)
    decoder = baselines.PublishedDecoder(parts.decoder)
    cases.check_score(decoder, tokens[:1], best, "float32")
    with pytest.raises(SystemExit, match="what the baseline scores"):
        cases.check_score(decoder, tokens[:1], replace(best, score=1.01 * best.score), "float32")
    cases.check_states(tokens, tokens, "float32", "theirs")
    with pytest.raises(SystemExit, match="theirs: differs from ours by 1"):
        cases.check_states(1.01 * tokens, tokens, "float32", "theirs")
    ranking = (torch.tensor([[1, 0, 2]]), torch.tensor([[0.7, 0.2, 0.1]]))
    bench_ranking.check_ranking(ranking, ranking, "float32", "theirs")
    with pytest.raises(SystemExit, match="theirs: log p of an answer differs"):
        bench_ranking.check_ranking((torch.tensor([[0, 1, 2]]), ranking[1]), ranking, "float32", "theirs")
