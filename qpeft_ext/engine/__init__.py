"""Passes over an LM: which pairs share one, and how it is run."""
