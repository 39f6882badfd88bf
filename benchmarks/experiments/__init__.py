"""Experiments with the engine: what its intervals and scores are worth where the answer is known (docs/experiments.md)."""
