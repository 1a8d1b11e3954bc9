"""Beam search and sampling as one would write them first: an item at a time, lists, no cache, the whole text read again
at every step. What the engine has to equal."""

import torch

from mplug2.generation import Hypothesis
from mplug2.generation.beam import length_penalty
from mplug2.generation.sampling import cut


def _log_p(decoder, context, rows):
    """(rows, V) of the token behind each row of ids."""
    states = decoder(torch.tensor(rows), context)
    return torch.log_softmax(decoder.logits(states[:, -1]), -1)


@torch.no_grad()
def plain_beam_search(decoder, context, *, beam_size, min_length, max_length, decoding, prefix=None):
    """Every hypothesis kept for the one item of `context`, best first."""
    beams = [([decoder.start_id] if prefix is None else prefix.tolist(), 0.0)]  # ids, sum of log p
    found = []
    for num_new in range(1, max_length + 1):
        log_p = _log_p(decoder, context, [ids for ids, _ in beams])
        if num_new <= min_length:
            log_p[:, decoder.end_id] = -1e20
        penalty = length_penalty(num_new)
        candidates = [
            Hypothesis([*ids, token], (total + p) / penalty)
            for (ids, total), row in zip(beams, log_p.tolist(), strict=True)
            for token, p in enumerate(row)
        ]
        candidates.sort(key=lambda h: -h.score)
        is_last = num_new == max_length
        if decoding == "released":
            beams = candidates[:beam_size]
            stops = is_last or beams[0].ids[-1] == decoder.end_id
            found += [h for h in beams if stops or h.ids[-1] == decoder.end_id]
        else:
            candidates = candidates[: 2 * beam_size]
            running = [h for h in candidates if h.ids[-1] != decoder.end_id]
            found += candidates if is_last else [h for h in candidates if h.ids[-1] == decoder.end_id]
            found = sorted(found, key=lambda h: -h.score)[:beam_size]
            beams = running[:beam_size]
            stops = is_last or not beams or (len(found) == beam_size and found[-1].score >= beams[0].score)
        if stops:
            break
        beams = [(h.ids, h.score * penalty) for h in beams]
    return sorted(found, key=lambda h: -h.score)[:beam_size]


@torch.no_grad()
def plain_sample(decoder, context, generator, *, num_samples, min_length, max_length, temperature, top_k, top_p):
    """`num_samples` draws for the one item of `context`, best first."""
    uniform = torch.rand(num_samples, 1 + max_length, dtype=torch.float64, generator=generator)
    drawn = []
    for row in uniform.tolist():
        ids, total = [decoder.start_id], 0.0
        while len(ids) <= max_length and (len(ids) == 1 or ids[-1] != decoder.end_id):
            log_p = _log_p(decoder, context, [ids])
            if len(ids) <= min_length:
                log_p[0, decoder.end_id] = -torch.inf
            p = cut(log_p / temperature, top_k, top_p).softmax(-1)[0].tolist()
            left, token = row[len(ids)], 0
            while left >= p[token] and token + 1 < len(p):
                left, token = left - p[token], token + 1
            ids.append(token)
            total += log_p[0, token].item()
        drawn.append(Hypothesis(ids, total / (len(ids) - 1)))
    return sorted(drawn, key=lambda h: -h.score)
