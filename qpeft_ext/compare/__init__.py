"""``qpeft compare``: methods × collections × seeds in one harness, with the same candidates, tokens, truncation and LM.

`plan` reads what is asked for, `methods` knows how each method is trained and ranks, `run` makes the results one by
one, `tables` and `page` show them.
"""
