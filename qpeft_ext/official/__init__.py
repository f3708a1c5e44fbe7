"""``compat="official"``: the composition of the official Q-PEFT code, its faults included, for comparison.

This restates what that code does, not how it is written. Whatever it does deterministically is reproduced: the head of
a long document is cut instead of its end; BOS and EOS are scored with the query; words of the template, and query
tokens when few others are left, become clues; filters look at raw vocabulary pieces; a token predicted with certainty
is left out of the mean. Where it draws at random, or gives NaN, a ValueError says so and names the pair.

`QPeftModel` is given the prompt, the clue module and the count of tokens of this folder when it is made; nothing else
knows of the variant.

Differences, and decisions where the official code does not say:

- A pair's score does not depend on the batch; it is that of an unpadded pair in float32. Ties go by position, where the
  official code has no order.
- The limit on tokens does not depend on the query (`prompt.OfficialPrompt`). A document is title, space, text.
- Repeated tokens are always dropped from the clues (its letter d, which all its runs have), and clues keep the order of
  their scores. In attention, filters mask tokens by id, so that d masks none.
- Where no token survives the filters, BOS and EOS stay out of the clues all the same.
- The stop words are another list; they are compared as they are written.
- The soft prompt is frozen, as in the published runs, and is therefore plain text. Modes 1 and 2 and random clues are
  left out.
"""

from __future__ import annotations
