"""The trained part: clues that a query extracts from a document (Q-PEFT-R and Q-PEFT-A).

Clue modules read document tokens as ids into the LM's frozen embedding table and return vectors in the space of
``inputs_embeds``: a table row times whatever scale the LM's embedding module applies.
Source: Q-PEFT, https://arxiv.org/abs/2404.04522.
"""
