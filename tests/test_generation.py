"""Beam search and sampling over small random decoders, against searches by brute force."""

import itertools

import pytest
import torch

from mplug2.config import DecoderConfig, TextConfig
from mplug2.generation import beam_search, sample
from mplug2.generation.beam import length_penalty
from mplug2.generation.sampling import cut
from mplug2.modules import Decoder

VOCAB, END = 7, 3


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    text = TextConfig(vocab_size=VOCAB, width=16, num_heads=2, mlp_width=32, max_positions=12)
    made = Decoder(DecoderConfig(num_layers=2, start_id=2, end_id=END), text).double().eval()
    for name, p in made.named_parameters():
        p.data.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.6)
    return made


@pytest.fixture
def context(decoder):
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    with torch.no_grad():
        return decoder.project(tokens, mask)


@torch.no_grad()
def log_probs(decoder, context, rows):
    """Summed log-probability of every row of ids behind its start token, for one item's context, without a cache."""
    ids = torch.tensor(rows)
    log_p = torch.log_softmax(decoder.logits(decoder(ids, context)), -1)[:, :-1]
    return log_p.gather(2, ids[:, 1:, None]).sum((1, 2)).tolist()


def log_prob(decoder, context, ids):
    return log_probs(decoder, context, [ids])[0]


@pytest.mark.parametrize("decoding", ["released", "standard"])
def test_scores_are_those_of_an_uncached_run(decoder, context, decoding):
    found = beam_search(decoder, context, beam_size=4, min_length=2, max_length=6, num_return=4, decoding=decoding)
    for item, hypotheses in enumerate(found):
        assert len(hypotheses) == 4
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        for h in hypotheses:
            total = log_prob(decoder, context.select(torch.tensor([item])), h.ids)
            assert h.score == pytest.approx(total / length_penalty(len(h.ids) - 1), rel=1e-10)


@pytest.mark.parametrize("shortest", [0, 1])
def test_standard_search_with_a_wide_beam_finds_the_best_of_all(decoder, context, shortest):
    length = 4
    options = {"beam_size": 300, "min_length": shortest, "max_length": length, "num_return": 300}
    found = beam_search(decoder, context, decoding="standard", **options)
    assert all(END not in h.ids[:-1] for hypotheses in found for h in hypotheses)
    words = [w for w in range(VOCAB) if w != END]
    ended = [[[2, *w, END] for w in itertools.product(words, repeat=n)] for n in range(shortest, length)]
    groups = [*ended, [[2, *w] for w in itertools.product(words, repeat=length)]]
    for item in range(3):
        one = context.select(torch.tensor([item]))
        scored = [
            (total / length_penalty(len(ids) - 1), ids)
            for group in groups
            for ids, total in zip(group, log_probs(decoder, one, group), strict=True)
        ]
        assert found[item][0].ids == max(scored)[1]


def test_standard_hypotheses_end_once_and_respect_the_shortest_length(decoder, context):
    for hypotheses in beam_search(
        decoder, context, beam_size=5, min_length=3, max_length=8, num_return=5, decoding="standard"
    ):
        for h in hypotheses:
            assert END not in h.ids[:-1]
            assert len(h.ids) >= 1 + 3


def test_items_do_not_influence_each_other(decoder, context):
    together = beam_search(decoder, context, beam_size=3, max_length=8, num_return=3)
    for item in range(3):
        alone = beam_search(decoder, context.select(torch.tensor([item])), beam_size=3, max_length=8, num_return=3)[0]
        assert [h.ids for h in alone] == [h.ids for h in together[item]]


def test_one_beam_is_greedy(decoder, context):
    found = beam_search(decoder, context, beam_size=1, min_length=0, max_length=8)
    for item, (h,) in enumerate(found):
        ids = [2]
        while len(ids) < 9 and (len(ids) == 1 or ids[-1] != END):
            with torch.no_grad():
                states = decoder(torch.tensor([ids]), context.select(torch.tensor([item])))
            ids.append(decoder.logits(states)[0, -1].argmax().item())
        assert h.ids == ids


def test_nothing_to_do(decoder, context):
    assert beam_search(decoder, context.select(torch.tensor([], dtype=torch.int64)), max_length=8) == []


def test_sampling_is_repeatable_and_its_cuts_hold(decoder, context):
    options = {"num_samples": 6, "max_length": 6, "temperature": 1.5}
    one = sample(decoder, context, seed=3, **options)
    assert one == sample(decoder, context, seed=3, **options)
    assert one != sample(decoder, context, seed=4, **options)
    for item, hypotheses in enumerate(one):
        for h in hypotheses:
            mean = log_prob(decoder, context.select(torch.tensor([item])), h.ids) / (len(h.ids) - 1)
            assert h.score == pytest.approx(mean, rel=1e-4)
    greedy = beam_search(decoder, context, beam_size=1, min_length=1, max_length=6)
    assert [h[0].ids for h in sample(decoder, context, top_k=1, max_length=6)] == [h[0].ids for h in greedy]


def test_cuts_keep_the_likeliest():
    logits = torch.log(torch.tensor([[0.5, 0.1, 0.25, 0.15], [0.1, 0.2, 0.3, 0.4]]))
    assert cut(logits, 2, None).isfinite().tolist() == [[True, False, True, False], [False, False, True, True]]
    assert cut(logits, None, 0.6).isfinite().tolist() == [[True, False, True, False], [False, False, True, True]]
    assert cut(logits, None, 0.95).isfinite().tolist() == [[True, True, True, True], [True, True, True, True]]
    assert cut(logits, None, 0.01).isfinite().sum() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoding": "best"}, "decoding must be"),
        ({"beam_size": 0}, "beam_size and num_return"),
        ({"min_length": 9, "max_length": 8}, "min_length <= max_length"),
        ({"max_length": 0, "min_length": 0}, "max_length >= 1"),
    ],
)
def test_bad_options(decoder, context, options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(decoder, context, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "min_length <= max_length"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"top_p": 1.5}, "top_p in"),
    ],
)
def test_bad_sampling_options(decoder, context, options, message):
    with pytest.raises(ValueError, match=message):
        sample(decoder, context, **options)


def test_sampling_continues_a_prefix(decoder, context):
    prefix = torch.tensor([[2, 4, 5]] * 3)
    found = sample(decoder, context, prefix=prefix, max_length=4, top_k=1)
    assert [h[0].ids[:3] for h in found] == [[2, 4, 5]] * 3
    greedy = beam_search(decoder, context, beam_size=1, min_length=1, max_length=4, prefix=prefix)
    assert [h[0].ids for h in found] == [h[0].ids for h in greedy]


def test_longer_than_the_position_table_is_an_error(decoder, context):
    with pytest.raises(ValueError, match="position table 12"):
        beam_search(decoder, context, beam_size=2, min_length=19, max_length=20)
