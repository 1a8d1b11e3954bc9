"""Ranking in tries equals every answer read alone, whatever they share and however the list is cut."""

import itertools

import pytest
import torch

from mplug2.config import DecoderConfig, TextConfig
from mplug2.generation import AnswerList, rank_answers, ranking
from mplug2.modules import Decoder

WIDTH, VOCAB, START, END = 16, 9, 2, 3
# Beginnings that are shared, an answer that another begins with, two that are equal, one without an end token.
ANSWERS = [[4, 5, END], [4, 5, 6, END], [4, END], [5, 4, 5, 8, END], [4, 5, 6, END], [6, 7], [6, 7, 1, END], [8, END]]


def padded(rows):
    rows = [[START, *row] for row in rows]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    text = TextConfig(vocab_size=VOCAB, width=WIDTH, num_heads=2, mlp_width=32, max_positions=12)
    made = Decoder(DecoderConfig(num_layers=2, start_id=START, end_id=END), text).double().eval()
    for name, p in made.named_parameters():
        p.data.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.6)
    return made


@pytest.fixture
def context(decoder):
    tokens = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    with torch.no_grad():
        return decoder.project(tokens, mask)


@torch.no_grad()
def log_p_of(decoder, context, rows):
    """(B, A): every answer alone, read whole; and of its first token."""
    whole = torch.empty(len(context), len(rows), dtype=torch.float64)
    for item, (a, row) in itertools.product(range(len(context)), enumerate(rows)):
        ids = torch.tensor([[START, *row]])
        log_p = torch.log_softmax(decoder.logits(decoder(ids, context.select(slice(item, item + 1)))), -1)
        whole[item, a] = log_p[0, :-1].gather(1, ids[0, 1:, None]).sum()
    start = torch.full((len(context), 1), START)
    first = torch.log_softmax(decoder.logits(decoder(start, context))[:, 0], -1)
    return whole, first[:, [row[0] for row in rows]]


def expected_of(decoder, context, rows, method, num_return, count_first_twice=True):
    whole, first = log_p_of(decoder, context, rows)
    found = []
    for scores, firsts in zip(whole.tolist(), first.tolist(), strict=True):
        chosen = list(range(len(rows)))
        if method == "released":
            chosen = sorted(chosen, key=lambda a: -firsts[a])[:num_return]
            scores = [s + f * count_first_twice for s, f in zip(scores, firsts, strict=True)]
        probs = torch.softmax(torch.tensor([scores[a] for a in chosen], dtype=torch.float64), 0).tolist()
        best = sorted(zip(probs, chosen, strict=True), key=lambda pair: -pair[0])[:num_return]
        found.append(best)
    return found


def assert_same(found, expected):
    index, probs = found
    for item, best in enumerate(expected):
        assert index[item].tolist() == [a for _, a in best]
        assert probs[item].tolist() == pytest.approx([p for p, _ in best], rel=1e-10)


@pytest.mark.parametrize("num_return", [1, 3, 8])
@pytest.mark.parametrize("method", ["released", "exact"])
def test_answers_in_a_trie_are_as_if_alone(decoder, context, method, num_return, monkeypatch):
    rows = [row for a, row in enumerate(ANSWERS) if a != 4]  # equal answers tie, to rounding
    num_return = min(num_return, len(rows))
    expected = expected_of(decoder, context, rows, method, num_return)
    for nodes, at_once, logits in ((512, 2048, 256), (1, 1, 1), (3, 4, 2), (4, 8, 3)):
        monkeypatch.setattr(ranking, "_TRIE_NODES", nodes)
        monkeypatch.setattr(ranking, "_ROWS", at_once)
        monkeypatch.setattr(ranking, "_LOGIT_ROWS", logits)
        assert_same(rank_answers(decoder, context, padded(rows), method=method, num_return=num_return), expected)


def test_the_first_token_may_count_once(decoder, context):
    found = rank_answers(decoder, context, padded(ANSWERS[:4]), num_return=3, count_first_twice=False)
    expected = expected_of(decoder, context, ANSWERS[:4], "released", 3, count_first_twice=False)
    assert_same(found, expected)


@pytest.mark.parametrize("method", ["released", "exact"])
def test_equal_answers_are_equally_likely(decoder, context, method):
    index, probs = rank_answers(decoder, context, padded(ANSWERS), method=method, num_return=len(ANSWERS))
    for item in range(3):
        p = dict(zip(index[item].tolist(), probs[item].tolist(), strict=True))
        assert p[1] == p[4]
        assert sum(p.values()) == pytest.approx(1)


def test_what_answers_share_is_read_once():
    trie = AnswerList(padded(ANSWERS)).tries[0]
    prefixes = {tuple(row[:n]) for row in ANSWERS for n in range(len(row))}
    assert len(trie.ids) == len(prefixes)
    assert len(trie.edge_ids) == len({tuple(row[:n]) for row in ANSWERS for n in range(1, len(row) + 1)})


def test_a_long_list_is_cut_into_small_tries_and_logits_are_few(decoder, context, monkeypatch):
    rows = [[a, b, c, END] for a, b, c in itertools.product((1, 4, 5, 6, 7, 8), repeat=3)]
    monkeypatch.setattr(ranking, "_TRIE_NODES", 40)
    monkeypatch.setattr(ranking, "_ROWS", 100)
    monkeypatch.setattr(ranking, "_LOGIT_ROWS", 30)
    sizes, made, read, run = [], decoder.logits, [], decoder.forward
    monkeypatch.setattr(decoder, "logits", lambda states: sizes.append(states.shape[:-1].numel()) or made(states))
    monkeypatch.setattr(decoder, "forward", lambda ids, *a, **b: read.append(ids.numel()) or run(ids, *a, **b))
    listed = AnswerList(padded(rows))
    rank_answers(decoder, context, listed, method="exact", num_return=5)
    assert max(len(trie.ids) for trie in listed.tries) <= 40
    assert sum(len(trie.ids) for trie in listed.tries) < 2 * (1 + 6 + 36 + 216)
    assert max(sizes) <= 30
    assert max(read) <= 100
    assert listed.tries is listed.tries  # made once


def test_no_items(decoder, context):
    none = context.select(slice(0, 0))
    for method in ranking.METHODS:
        index, probs = rank_answers(decoder, none, padded(ANSWERS), method=method, num_return=2)
        assert index.shape == probs.shape == (0, 2)


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.int64), {}, "at least one answer"),
        (torch.tensor([[2, 4, 3], [2, 0, 0]]), {}, "answer 1 must be a start token and more"),
        (torch.tensor([[2, 4, 3], [1, 4, 3]]), {}, "answer 1 must be a start token and more"),
        (padded([[4] * 13]), {}, "13 word pieces, the position table 12"),
        (padded(ANSWERS), {"num_return": 9}, "num_return must be in 1..8, got 9"),
        (padded(ANSWERS), {"method": "best"}, "method must be one of released, exact"),
    ],
)
def test_errors(decoder, context, answers, options, message):
    with pytest.raises(ValueError, match=message):
        rank_answers(decoder, context, answers, **{"num_return": 1, **options})
