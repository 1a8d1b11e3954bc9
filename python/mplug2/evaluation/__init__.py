"""Evaluation: metrics, and runs of a model over a data folder."""
