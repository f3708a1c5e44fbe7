"""Text as token ids: prompts, and batches of query–document pairs."""
