"""How the published code generates, re-stated in plain PyTorch over the weights of a `Parts`: what the engine is timed
against. No cache; states tiled for every beam and candidate; keys and values of all tiles projected at every token."""

from baselines.beam import beam_search
from baselines.ranking import rank_answers
from baselines.structure import PublishedDecoder, PublishedEncoder, compile_layers

__all__ = ["PublishedDecoder", "PublishedEncoder", "beam_search", "compile_layers", "rank_answers"]
