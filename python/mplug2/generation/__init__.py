"""Text generation over a decoder and a context projected once."""

from mplug2.generation.beam import BeamSearch, beam_search
from mplug2.generation.engine import decode, decode_stream
from mplug2.generation.ranking import AnswerList, rank_answers
from mplug2.generation.sampling import Sampling, sample
from mplug2.generation.search import Hypothesis, Search

__all__ = [
    "AnswerList", "BeamSearch", "Hypothesis", "Sampling", "Search",
    "beam_search", "decode", "decode_stream", "rank_answers", "sample",
]  # fmt: skip
