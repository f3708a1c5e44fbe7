"""``qpeft compare``: methods × collections × seeds in one harness, with the same candidates, tokens, truncation and LM.

`plan_file` reads a plan, `methods` has what each method sets, `run` makes the results, `tables` compares them, and
`sections`, `texts` and `page` show them.
"""
