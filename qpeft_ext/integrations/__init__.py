"""Plug-ins for frameworks, one file each; a file imports its framework, so it is imported where it is used.

Every plug-in takes the same three things as its reranker: a `Reranker`, the path or Hub id of an adapter, or the URL of
a server that answers Cohere's or Jina's rerank requests (`source.Source`).
"""
