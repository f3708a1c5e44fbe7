"""`Reranker`, runs over many queries, their workers, and the first stage."""
