"""``compat="official"``: the composition of the official Q-PEFT code, its faults included, for comparison.

A restatement of what that code does, not of how it is written. What it does deterministically is reproduced: the head
of a long document is cut instead of its end; BOS and EOS are scored with the query; words of the template, and query
tokens when few others are left, become clues; filters look at raw vocabulary pieces; a token predicted with certainty
is left out of the mean. Where it draws at random, or gives NaN, a ValueError says so and names the pair.

What differs, or is not known of that code and was decided here:

- Every pair is as if alone and unpadded, in float32. Ties go by position, where the official code has no order.
- The limit on tokens does not depend on the query (`prompt.OfficialPrompt`). A document is title, space, text.
- Repeated tokens are always dropped from the clues (its letter d, which all its runs have), and clues keep the order of
  their scores. Of attention, filters mask tokens by id, so that d masks none.
- Where no token survives the filters, BOS and EOS stay out of the clues all the same.
- The stop words are another list; they are compared as they are written.
- The soft prompt is frozen, as in the published runs, hence plain text. Modes 1 and 2 and random clues are left out.
"""

from __future__ import annotations
