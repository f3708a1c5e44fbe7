"""``qpeft serve``: rerankers behind HTTP, in the forms that clients of Cohere, Jina, vLLM and TEI send."""
