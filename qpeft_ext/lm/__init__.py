"""One loaded language model: loading it, its head, and what a pass sets on it."""
