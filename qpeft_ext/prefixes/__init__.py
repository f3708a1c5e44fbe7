"""Keys and values of document prefixes: in memory, on disk, and as an index."""
