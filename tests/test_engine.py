"""The running batch equals a search of one item alone, without cache: whatever shares the batch, comes and leaves."""

import itertools
import math

import pytest
import torch

from mplug2.config import DecoderConfig, TextConfig
from mplug2.generation import BeamSearch, Sampling, decode, decode_stream
from mplug2.generation.engine import _ContextSlots
from mplug2.modules import Decoder
from plain_generation import plain_beam_search, plain_sample

WIDTH, VOCAB, END = 16, 11, 3
BEAMS = {"beam_size": 4, "min_length": 2, "max_length": 7}


def make_decoder(seed: int, dtype=torch.float64) -> Decoder:
    """A decoder whose end token is likely enough for texts of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    text = TextConfig(vocab_size=VOCAB, width=WIDTH, num_heads=2, mlp_width=32, max_positions=12)
    made = Decoder(DecoderConfig(num_layers=2, start_id=2, end_id=END), text).double().eval()
    for name, p in made.named_parameters():
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_((1.0 if "norm" in name and "weight" in name else 0.0) + 0.6 * drawn)
    for p in (made.head.norm.weight, made.head.norm.bias, made.head.bias):
        p.data *= 0.2
    made.head.bias.data[END] += 1.0
    return made.to(dtype)


def make_items(seed: int, lengths, dtype=torch.float64):
    """Context tokens and masks of several items; every third one has a mask."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for i, length in enumerate(lengths):
        tokens = torch.randn(length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        mask = torch.rand(length, generator=generator) < 0.7 if i % 3 == 2 else None
        if mask is not None:
            mask[0] = True
        items.append((tokens, mask))
    return items


def alone(decoder, item):
    tokens, mask = item
    with torch.no_grad():
        return decoder.project(tokens[None], None if mask is None else mask[None])


def together(decoder, items):
    with torch.no_grad():
        return decoder.project(torch.stack([tokens for tokens, _ in items]))


def assert_same(found, expected, tolerance=1e-10):
    assert [h.ids for h in found] == [h.ids for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], rel=tolerance)


@pytest.mark.parametrize("decoding", ["released", "standard"])
@pytest.mark.parametrize("seed", range(3))
def test_items_that_come_and_go_are_as_if_alone(decoding, seed):
    decoder, items = make_decoder(seed), make_items(seed, [5, 5, 4, 7, 2, 5, 9, 5])
    expected = [plain_beam_search(decoder, alone(decoder, item), decoding=decoding, **BEAMS) for item in items]
    for num_slots, graph in ((1, False), (3, False), (8, False), (20, False), (3, True)):
        search = BeamSearch(decoder, decoding=decoding, num_return=4, **BEAMS)
        found = dict(decode_stream(decoder, items, search, num_slots=num_slots, cuda_graph=graph))
        assert sorted(found) == list(range(len(items)))
        for i, hypotheses in enumerate(expected):
            assert_same(found[i], hypotheses)
    assert len({len(hypotheses[0].ids) for hypotheses in expected}) > 1, "all items end together"


@pytest.mark.parametrize("decoding", ["released", "standard"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beams", [BEAMS, {"beam_size": 20, "min_length": 0, "max_length": 5}])
def test_items_that_stay_are_as_if_alone(decoding, seed, beams):
    """An item that is done is left alone while the others go on."""
    decoder, items = make_decoder(seed), [(tokens, None) for tokens, _ in make_items(seed, [5] * 6)]
    options = {"decoding": decoding, **beams}
    search = BeamSearch(decoder, num_return=beams["beam_size"], **options)
    for item, found in zip(items, decode(decoder, together(decoder, items), search), strict=True):
        assert_same(found, plain_beam_search(decoder, alone(decoder, item), **options))


@pytest.mark.parametrize("decoding", ["released", "standard"])
@pytest.mark.parametrize(("beam_size", "min_length", "max_length"), [(1, 0, 1), (2, 1, 3), (20, 0, 5), (6, 5, 5)])
def test_widths_and_lengths(decoding, beam_size, min_length, max_length):
    options = {"beam_size": beam_size, "min_length": min_length, "max_length": max_length, "decoding": decoding}
    for seed in range(3):
        decoder, items = make_decoder(seed), make_items(seed, [5, 6])
        search = BeamSearch(decoder, num_return=beam_size, **options)
        for i, found in decode_stream(decoder, items, search, num_slots=2):
            assert_same(found, plain_beam_search(decoder, alone(decoder, items[i]), **options))


@pytest.mark.parametrize("decoding", ["released", "standard"])
def test_a_prefix_is_continued(decoding):
    """Nothing ends within the prefix, however likely the end token is there."""
    decoder, items = make_decoder(1), make_items(1, [5, 3, 5])
    decoder.head.bias.data[END] += 2.0
    options = {**BEAMS, "min_length": 0, "decoding": decoding, "prefix": torch.tensor([2, 7, 5])}
    for i, found in decode_stream(decoder, items, BeamSearch(decoder, num_return=4, **options), num_slots=2):
        assert_same(found, plain_beam_search(decoder, alone(decoder, items[i]), **options))


@pytest.mark.parametrize("cuts", [{"top_k": None, "top_p": None}, {"top_k": 5, "top_p": 0.8}])
def test_draws_depend_on_the_order_of_items_alone(cuts):
    decoder, items = make_decoder(2), make_items(2, [5, 2, 5, 6, 5])
    options = {"num_samples": 3, "min_length": 1, "max_length": 7, "temperature": 1.3, **cuts}
    generator = torch.Generator().manual_seed(7)
    expected = [plain_sample(decoder, alone(decoder, item), generator, **options) for item in items]
    for num_slots, graph in ((1, False), (2, False), (5, False), (2, True)):
        search = Sampling(decoder, seed=7, **options)
        for i, found in decode_stream(decoder, items, search, num_slots=num_slots, cuda_graph=graph):
            assert_same(found, expected[i])
    items = [(tokens, None) for tokens, _ in make_items(2, [5] * 4)]
    generator.manual_seed(7)
    for item, found in zip(
        items, decode(decoder, together(decoder, items), Sampling(decoder, seed=7, **options)), strict=True
    ):
        assert_same(found, plain_sample(decoder, alone(decoder, item), generator, **options))


def test_absorbed_keys_and_values_give_the_same():
    decoder, items = make_decoder(3), make_items(3, [5, 5, 8, 5])
    made, absorbed = (
        dict(decode_stream(decoder, items, BeamSearch(decoder, num_return=4, **BEAMS), num_slots=2, absorb=absorb))
        for absorb in (False, True)
    )
    for i, found in made.items():
        assert_same(absorbed[i], found)
    context = decoder.project(torch.stack([items[0][0], items[1][0]]), absorb=True)
    assert len(context.select(torch.tensor([1, 0, 1]))) == 3


def test_items_are_taken_only_when_a_slot_is_free():
    decoder, items = make_decoder(4), make_items(4, [5] * 6)
    taken = itertools.count()

    def source():
        for item in items:
            next(taken)
            yield item

    stream = decode_stream(decoder, source(), BeamSearch(decoder, **BEAMS), num_slots=2)
    next(stream)
    assert next(taken) == 2  # of six
    assert len(list(stream)) == 5


def test_a_short_item_does_not_wait_for_a_long_one():
    """Item 0 needs seven steps; those behind it pass through the other slot in the meantime."""
    decoder, items = make_decoder(5), make_items(5, [5] * 4)
    decoder.head.bias.data[END] = 30.0  # ends as soon as it may
    order = []

    class Long(BeamSearch):
        def advance(self, log_p):
            log_p[0, ..., END] = -1e20
            return super().advance(log_p)

    search = Long(decoder, beam_size=2, min_length=0, max_length=7)
    order = [i for i, _ in decode_stream(decoder, items, search, num_slots=2)]
    assert order == [1, 2, 3, 0]


def test_float32_agrees_where_the_cut_is_clear():
    for seed in range(5):
        items = make_items(seed, [5, 4, 5])
        exact = make_decoder(seed)
        single = make_decoder(seed, torch.float32)
        halves = [(tokens.float(), mask) for tokens, mask in items]
        truth = dict(decode_stream(exact, items, BeamSearch(exact, num_return=4, **BEAMS)))
        for i, found in decode_stream(single, halves, BeamSearch(single, num_return=4, **BEAMS)):
            scores = [h.score for h in truth[i]]
            if min((a - b for a, b in itertools.pairwise(scores)), default=1) > 1e-4:
                assert_same(found, truth[i], tolerance=1e-4)


def test_absorbed_tokens_are_kept_once():
    decoder, items = make_decoder(3), make_items(3, [5, 8])
    slots = _ContextSlots(decoder, 2, absorb=True)
    for slot, (tokens, _) in enumerate(items):
        slots.put(slot, tokens, None)
    context = slots.first(2)
    assert len(slots.layers) == 1
    assert len(context.layers) == len(decoder.layers)
    assert len({layer.data_ptr() for layer in context.layers}) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # by the reference, by the kernels
@pytest.mark.parametrize("method", [BeamSearch, Sampling])
def test_an_item_that_is_not_finite_leaves_the_next_one_alone(method, dtype):
    decoder, items = make_decoder(6, dtype), make_items(6, [5, 5, 5], dtype)
    items[0] = (torch.full_like(items[0][0], torch.nan), None)
    options = {"min_length": 2, "max_length": 7} | ({"seed": 0} if method is Sampling else {"num_return": 2})
    found = dict(decode_stream(decoder, items, method(decoder, **options), num_slots=1))
    expected = dict(decode_stream(decoder, [items[1], *items[1:]], method(decoder, **options), num_slots=1))
    assert all(math.isnan(h.score) for h in found[0])
    assert len(found[0]) == len(expected[0])
    for item in (1, 2):
        assert_same(found[item], expected[item])


def test_an_error_of_the_items_waits_for_those_before_it():
    decoder, items = make_decoder(6), make_items(6, [5, 5, 5])

    def source():
        yield from items
        raise OSError("the disk is gone")

    found = decode_stream(decoder, source(), BeamSearch(decoder, **BEAMS), num_slots=8)
    assert sorted(next(found)[0] for _ in items) == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_no_slots_are_an_error_at_once():
    decoder = make_decoder(6)
    with pytest.raises(ValueError, match=r"num_slots \(batch_size\) must be at least 1, got 0"):
        decode_stream(decoder, [], BeamSearch(decoder, **BEAMS), num_slots=0)


def test_nothing_in_nothing_out():
    decoder = make_decoder(6)
    assert list(decode_stream(decoder, [], BeamSearch(decoder, **BEAMS))) == []
    context = decoder.project(torch.zeros(0, 5, WIDTH, dtype=torch.float64))
    assert decode(decoder, context, BeamSearch(decoder, **BEAMS)) == []


@pytest.mark.gpu
def test_a_captured_step_gives_the_same():
    decoder, items = make_decoder(7, torch.float32).cuda(), make_items(7, [5, 5, 8, 5, 3], torch.float32)
    items = [(tokens.cuda(), None if mask is None else mask.cuda()) for tokens, mask in items]
    eager, captured = (
        dict(decode_stream(decoder, items, BeamSearch(decoder, **BEAMS), num_slots=2, cuda_graph=graph))
        for graph in (False, True)
    )
    for i, found in eager.items():
        assert_same(captured[i], found, tolerance=1e-5)
