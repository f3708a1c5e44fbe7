"""Queries written by an LM, for training without queries."""
