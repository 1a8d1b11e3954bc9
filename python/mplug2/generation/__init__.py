"""Text generation over a decoder and a context projected once."""

from mplug2.generation.beam import Hypothesis, beam_search
from mplug2.generation.ranking import rank_answers
from mplug2.generation.sampling import sample

__all__ = ["Hypothesis", "beam_search", "rank_answers", "sample"]
