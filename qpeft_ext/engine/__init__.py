"""Passes over an LM: the schedule of which pairs share one, the engines that run them, and the scores they give."""
