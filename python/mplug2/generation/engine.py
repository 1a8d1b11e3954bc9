"""The running batch of a decoder: items enter free slots, are decoded side by side, and leave as they finish.

A context's keys and values are projected once, into the item's slot, and shared by its beams or samples. What a step
does is all on the device (`Search`); the host looks only every few steps which items are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mplug2._errors_last import ErrorsLast
from mplug2.generation.cache import Cache, log_probs
from mplug2.generation.search import Hypothesis, Search
from mplug2.modules.decoder import Context, Decoder

_STEPS_PER_LOOK = 4  # on a GPU, where a look at what is done waits for all steps before it


@torch.no_grad()
def decode(decoder: Decoder, context: Context, search: Search) -> list[list[Hypothesis]]:
    """What `search` finds for every item of a context, all decoded at once."""
    num_items = len(context)
    if num_items == 0:
        return []
    batch = _RunningBatch(decoder, search, num_items, context)
    for slot in range(num_items):
        batch.admit(slot)
    while any(batch.look(context)):
        pass
    return [search.result(slot) for slot in range(num_items)]


def decode_stream(
    decoder: Decoder,
    items: Iterable[tuple[Tensor, Tensor | None]],
    search: Search,
    *,
    num_slots: int = 8,
    absorb: bool = False,
    cuda_graph: bool = False,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """(number of an item, what `search` finds for it), as the items finish, whatever their order.

    Args:
        items: context tokens (K, D) and their mask (K,) bool or None, of equal or unequal K; taken from the iterator
            only when a slot is free. An error of theirs is raised when the items before it are done.
        num_slots: items decoded side by side.
        absorb: see `Decoder.project`: a fraction 1 / (2 * layers) of the memory of keys and values.
        cuda_graph: steps of one shape, closed slots included, captured where there is a GPU; not yet run on one.

    Raises:
        ValueError: num_slots is below 1.
    """
    if num_slots < 1:
        raise ValueError(f"decode_stream: num_slots (batch_size) must be at least 1, got {num_slots}")
    return _stream(decoder, items, search, num_slots, absorb, cuda_graph)


@torch.no_grad()
def _stream(
    decoder: Decoder,
    items: Iterable[tuple[Tensor, Tensor | None]],
    search: Search,
    num_slots: int,
    absorb: bool,
    cuda_graph: bool,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    taken = ErrorsLast(items)
    waiting = enumerate(taken)
    slots, occupied, batch = _ContextSlots(decoder, num_slots, absorb=absorb), {}, None
    while True:
        for slot in range(num_slots):
            if slot not in occupied and (entry := next(waiting, None)) is not None:
                occupied[slot], (tokens, mask) = entry
                slots.put(slot, tokens, mask)
                if batch is None:
                    batch = _RunningBatch(decoder, search, num_slots, slots.first(1), cuda_graph=cuda_graph)
                batch.admit(slot)
        if not occupied:
            taken.finish()
            return
        if not batch.is_fixed:  # closed slots would cost their share of every step
            for slot in range(len(occupied)):
                if slot not in occupied:
                    last = max(occupied)
                    slots.move(last, slot)
                    batch.move(last, slot)
                    occupied[slot] = occupied.pop(last)
        is_open = batch.look(slots.first(num_slots if batch.is_fixed else len(occupied)))
        for slot in [slot for slot in occupied if not is_open[slot]]:
            yield occupied.pop(slot), search.result(slot)


class _RunningBatch:
    """The state of `num_slots` items: the search's and the cache's."""

    def __init__(self, decoder: Decoder, search: Search, num_slots: int, context: Context, *, cuda_graph: bool = False):
        self.decoder, self.search = decoder, search
        search.allocate(num_slots, context.device, torch.promote_types(context.dtype, torch.float32))
        self.cache = Cache(decoder, num_slots * search.width, search.capacity)
        self.ages = [0] * num_slots  # steps since an item came
        self.is_fixed = cuda_graph
        has_gpu = context.device.type == "cuda"
        self._steps_per_look = _STEPS_PER_LOOK if has_gpu else 1
        self._captures, self._graph, self._captured = cuda_graph and has_gpu, None, None

    def admit(self, slot: int) -> None:
        self.search.admit(slot)
        self.cache.clear(self._rows(slot))
        self.ages[slot] = 0

    def move(self, source: int, target: int) -> None:
        self.search.move(source, target)
        self.cache.move(self._rows(source), self._rows(target))
        self.ages[target] = self.ages[source]

    def _rows(self, slot: int) -> slice:
        width = self.search.width
        return slice(slot * width, (slot + 1) * width)

    def look(self, context: Context) -> list[bool]:
        """Some steps for the first slots, those of `context`; then whether each goes on."""
        for _ in range(self._steps_per_look):
            self.ages = [age + 1 for age in self.ages]
            if self._captures and self._captured is not None:
                self._replay(context)
            else:
                self._step(context, min(max(self.ages[: len(context)]), self.search.capacity))
                self._captured = ()  # what is made on first use is there now
        return self.search.is_open[: len(context)].tolist()

    def _step(self, context: Context, num_tokens: int) -> None:
        search, num_items = self.search, len(context)
        ids = search.next_ids(num_items).flatten()
        self.cache.lengths = search.position[:num_items].repeat_interleave(search.width)
        states = self.decoder(ids[:, None], context, cache=self.cache)
        log_p = log_probs(self.decoder.logits(states[:, 0]))
        origin = search.advance(log_p.unflatten(0, (num_items, -1)))
        if origin is not None:
            first = torch.arange(0, len(ids), search.width, device=ids.device)[:, None]
            self.cache.reorder((first + origin).flatten(), num_tokens)

    def _replay(self, context: Context) -> None:
        """A step as a CUDA graph, captured again whenever the context lies elsewhere."""
        stored = [*context.layers, *([] if context.mask is None else [context.mask])]
        where = tuple(t.data_ptr() for t in stored)
        if where != self._captured:
            self._graph, self._captured = torch.cuda.CUDAGraph(), where
            with torch.cuda.graph(self._graph):
                self._step(context, self.search.capacity)
        self._graph.replay()


class _ContextSlots:
    """Room for the contexts of `num_slots` items, of as many tokens as the longest so far."""

    def __init__(self, decoder: Decoder, num_slots: int, *, absorb: bool):
        self.decoder, self.num_slots, self.absorb = decoder, num_slots, absorb
        self.capacity = 0
        self.layers: list[Tensor] = []  # (slots, capacity, ...) each; one where all layers attend to the tokens
        self.mask: Tensor | None = None  # (slots, capacity); None as long as all items fill their slots

    def put(self, slot: int, tokens: Tensor, mask: Tensor | None) -> None:
        """Project an item's tokens (K, D), with mask (K,), into a slot."""
        length = len(tokens)
        self._make_room(tokens, is_masked=mask is not None)
        made_of = [tokens[None]] if self.absorb else self.decoder.project_layers(tokens[None])
        for i, made in enumerate(made_of):
            if i == len(self.layers):
                self.layers.append(_storage(made, self.num_slots, self.capacity))
            self.layers[i][slot, :length] = made[0]
            self.layers[i][slot, length:] = 0  # masked, but memory there may hold NaN
        if self.mask is not None:
            self.mask[slot, :length] = True if mask is None else mask
            self.mask[slot, length:] = False

    def _make_room(self, tokens: Tensor, *, is_masked: bool) -> None:
        length, before = len(tokens), self.capacity
        self.capacity = max(length, before)
        if self.mask is None and (is_masked or before not in (0, length)):
            self.mask = torch.ones(self.num_slots, before, dtype=torch.bool, device=tokens.device)
        if self.mask is not None:
            self.mask = _lengthened(self.mask, self.capacity)
        self.layers = [_lengthened(t, self.capacity) for t in self.layers]

    def move(self, source: int, target: int) -> None:
        for t in self.layers if self.mask is None else [*self.layers, self.mask]:
            t[target] = t[source]

    def first(self, num_slots: int) -> Context:
        """The contexts of the first slots."""
        layers = self.layers * len(self.decoder.layers) if self.absorb else self.layers
        return Context(layers, self.mask).select(slice(num_slots))


def _storage(like: Tensor, num_slots: int, capacity: int) -> Tensor:
    """Room (slots, capacity, ...) for contexts like `like` (1, K, ...); keys and values of a head lie together.

    A step reads all of them: in the order of the projection every token of a head would be in another page (1.9 times
    slower at 5 beams in bfloat16, 2 cores).
    """
    if like.dim() == 3:
        return like.new_empty(num_slots, capacity, like.shape[2])
    _, _, pair, heads, head_dim = like.shape
    return like.new_empty(num_slots, pair, heads, capacity, head_dim).permute(0, 3, 1, 2, 4)


def _lengthened(t: Tensor, length: int) -> Tensor:
    """t (slots, K, ...) with zeros behind its K tokens up to `length`."""
    if t.shape[1] == length:
        return t
    longer = t.new_empty(len(t), length) if t.dim() == 2 else _storage(t, len(t), length)
    longer[:, : t.shape[1]] = t
    longer[:, t.shape[1] :] = 0
    return longer
