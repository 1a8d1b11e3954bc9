"""Ranking of a closed list of answers by their likelihood.

Answers are put into a trie: what several of them begin with is read once. The decoder reads a trie's nodes side by
side, each seeing itself and its ancestors, and all of them one copy of the context's keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from mplug2.generation.cache import log_probs
from mplug2.modules.decoder import Context, Decoder

METHODS = ("released", "exact")
_TRIE_NODES = 512  # of one trie: its nodes attend to each other, so work and memory grow with their square
_ROWS = 2048  # nodes of all items that the decoder reads at once
_LOGIT_ROWS = 256  # nodes whose logits are made at once


class AnswerList:
    """Answers (A, S) as ids from the start token to the end token, padded with 0, and what is made of them once.

    Raises:
        ValueError: there are none, or one has no token behind the start token, or they start differently.
    """

    def __init__(self, answers: Tensor):
        if answers.dim() != 2 or len(answers) == 0:
            raise ValueError(f"ranking: needs at least one answer, as ids (A, S), got shape {tuple(answers.shape)}")
        self.rows = [[i for i in row if i != 0] for row in answers.tolist()]
        short = next((a for a, row in enumerate(self.rows) if len(row) < 2 or row[0] != self.rows[0][0]), None)
        if short is not None:
            raise ValueError(
                f"ranking: answer {short} must be a start token and more, as the first one, got {self.rows[short]}"
            )
        self.longest = max(len(row) for row in self.rows)
        self.start_id = self.rows[0][0]
        self.first = torch.tensor([row[1] for row in self.rows])  # (A,)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def tries(self) -> list[_Trie]:
        """Of all answers."""
        return list(self.tries_of(range(len(self))))

    def tries_of(self, chosen: Sequence[int]) -> Iterator[_Trie]:
        """Tries that hold the chosen answers, each of few nodes; neighbours in the order of words share one."""
        trie = _TrieBuilder()
        for answer in sorted(chosen, key=lambda a: self.rows[a]):
            row = self.rows[answer]
            if trie.answers and trie.num_nodes_with(row) > _TRIE_NODES:
                yield trie.build()
                trie = _TrieBuilder()
            trie.add(answer, row)
        yield trie.build()


@dataclass(frozen=True)
class _Trie:
    """Nodes are the tokens that the decoder reads, every one behind its parent; edges the tokens whose log p counts."""

    ids: Tensor  # (M,)
    depths: Tensor  # (M,)
    visible: Tensor  # (M, M): a node sees its ancestors and itself
    edge_nodes: Tensor  # (E,), ascending: the node whose next token is ...
    edge_ids: Tensor  # (E,)
    answers: Tensor  # (A',): which these are in the list
    paths: Tensor  # (A', P): edges of each answer, padded with E


class _TrieBuilder:
    def __init__(self) -> None:
        self.nodes: dict[tuple[int, ...], int] = {}  # of the prefix that ends in the node
        self.edges: dict[tuple[int, ...], int] = {}  # of the prefix that ends in the edge's token
        self.answers: list[int] = []
        self.paths: list[list[int]] = []

    def num_nodes_with(self, row: list[int]) -> int:
        return len(self.nodes) + sum(tuple(row[:n]) not in self.nodes for n in range(1, len(row)))

    def add(self, answer: int, row: list[int]) -> None:
        for n in range(1, len(row)):
            self.nodes.setdefault(tuple(row[:n]), len(self.nodes))
        prefixes = [tuple(row[:n]) for n in range(2, len(row) + 1)]
        self.paths.append([self.edges.setdefault(prefix, len(self.edges)) for prefix in prefixes])
        self.answers.append(answer)

    def build(self) -> _Trie:
        visible = torch.eye(len(self.nodes), dtype=torch.bool)
        for prefix, node in self.nodes.items():  # parents come before their children
            if len(prefix) > 1:
                visible[node] |= visible[self.nodes[prefix[:-1]]]
        parents = torch.tensor([self.nodes[prefix[:-1]] for prefix in self.edges])
        edge_nodes, order = parents.sort(stable=True)
        place = torch.empty(len(order) + 1, dtype=torch.int64)
        place[order] = torch.arange(len(order))
        place[-1] = len(order)
        longest = max(map(len, self.paths))
        paths = torch.tensor([path + [len(order)] * (longest - len(path)) for path in self.paths])
        return _Trie(
            ids=torch.tensor([prefix[-1] for prefix in self.nodes]),
            depths=torch.tensor([len(prefix) - 1 for prefix in self.nodes]),
            visible=visible,
            edge_nodes=edge_nodes,
            edge_ids=torch.tensor([prefix[-1] for prefix in self.edges])[order],
            answers=torch.tensor(self.answers),
            paths=place[paths],
        )


@torch.no_grad()
def rank_answers(
    decoder: Decoder,
    context: Context,
    answers: Tensor | AnswerList,
    *,
    num_return: int,
    method: str = "released",
    count_first_twice: bool = True,
) -> tuple[Tensor, Tensor]:
    """The likeliest of some answers for every item: indices and probabilities, (B, k) each, best first.

    Memory beside the context: 256 rows of logits and of their logarithms, 8 V bytes each (125 MB at V = 30,522), and
    the decoder's activations for 2,048 tokens, whatever the length of the list.

    Args:
        answers: (A, S) ids from the start token to the end token, padded with 0, or a list made of them, which is worth
            keeping where many batches are ranked.
        num_return: k; at most A.
        method: "released", the rule of the reference: a shortlist of the k answers whose first token is likeliest (of
            equal ones those that stand first), then log p(first token) + log p(whole answer), softmax over the
            shortlist. "exact": log p(whole answer) of every answer, softmax over all of them, the k likeliest.
        count_first_twice: of "released"; False ranks the shortlist by log p(whole answer) alone.
    """
    if method not in METHODS:
        raise ValueError(f"rank_answers: method must be one of {', '.join(METHODS)}, got {method!r}")
    answers = answers if isinstance(answers, AnswerList) else AnswerList(answers)
    if not 1 <= num_return <= len(answers):
        raise ValueError(f"rank_answers: num_return must be in 1..{len(answers)}, got {num_return}")
    decoder.embeddings.check_length(answers.longest - 1)
    if method == "exact":
        return _best(_likelihoods(decoder, context, answers, None), num_return)
    start = torch.full((len(context), 1), answers.start_id, device=context.device)
    first = log_probs(decoder.logits(decoder(start, context)[:, -1]))[:, answers.first.to(context.device)]  # (B, A)
    first, shortlist = (x[:, :num_return] for x in first.sort(dim=1, descending=True, stable=True))
    score = _likelihoods(decoder, context, answers, shortlist.tolist()).gather(1, shortlist)
    order, probs = _best(score + first if count_first_twice else score, num_return)
    return shortlist.gather(1, order), probs


def _best(scores: Tensor, num_return: int) -> tuple[Tensor, Tensor]:
    """By score, not by probability: those that underflow differ, too."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :num_return]
    return order, torch.softmax(scores, 1).gather(1, order)


def _likelihoods(decoder: Decoder, context: Context, answers: AnswerList, chosen: list[list[int]] | None) -> Tensor:
    """log p (B, A) of the answers chosen for each item, -inf for the others; None: of all, for all items."""
    dtype = torch.promote_types(context.dtype, torch.float32)
    result = torch.full((len(context), len(answers)), -torch.inf, dtype=dtype, device=context.device)
    # Shortlists differ from item to item, so each item has tries of its own.
    groups = [slice(None)] if chosen is None else [slice(i, i + 1) for i in range(len(context))]
    for i, items in enumerate(groups):
        for trie in answers.tries if chosen is None else answers.tries_of(chosen[i]):
            at_once = max(1, _ROWS // len(trie.ids))
            for first in range(0, len(result[items]), at_once):
                part = slice(first, first + at_once)
                found = _score(decoder, context.select(items).select(part), trie)
                result[items][part, trie.answers.to(result.device)] = found.to(dtype)
    return result


def _score(decoder: Decoder, context: Context, trie: _Trie) -> Tensor:
    """log p (B, A') of the answers of a trie."""
    items, device = len(context), context.device
    ids, depths, visible = trie.ids.to(device), trie.depths.to(device), trie.visible.to(device)
    states = decoder(ids.expand(items, -1), context, positions=depths, visible=visible[None])
    edges = torch.zeros(
        items, len(trie.edge_ids) + 1, device=device, dtype=torch.promote_types(states.dtype, torch.float32)
    )
    # Nodes in pieces: logits of all of them would be the largest thing in memory.
    at_once = max(1, _LOGIT_ROWS // items)
    starts = torch.searchsorted(trie.edge_nodes, torch.arange(0, len(ids) + at_once, at_once)).tolist()
    for piece, (begin, end) in enumerate(pairwise(starts)):
        first = piece * at_once
        log_p = log_probs(decoder.logits(states[:, first : first + at_once]))
        nodes, tokens = trie.edge_nodes[begin:end].to(device) - first, trie.edge_ids[begin:end].to(device)
        edges[:, begin:end] = log_p[:, nodes, tokens]
    return edges[:, trie.paths.to(device)].sum(2)
