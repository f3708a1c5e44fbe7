"""Where sentences begin and end in a text: a few rules, for the borders of passages.

A sentence ends

- at a line break, so that code and tables are split between lines;
- behind ``.``, ``!``, ``?`` or ``…`` (and quotes or brackets that close behind it), if a space follows and then no
  lowercase letter. A dot ends none behind an initial or an abbreviation (``J. Smith``, ``e.g. this``, ``No. 5``);
- behind ``。``, ``！``, ``？``, ``｡``, ``।``, ``؟`` and ``۔``, whatever follows.

A rule that errs moves the border of a passage; no text is lost.
"""

from __future__ import annotations

import re

Span = tuple[int, int]  # (start, end) of characters, end exclusive

_END = re.compile(
    r"""
    (?P<line>[\r\n\f\v\x85\u2028\u2029]+)
    | (?P<full>[。！？｡।؟۔]+["”’」』）】》)\]]*)
    | (?P<dot>[.!?…]+)["'”’»)\]]*(?=\s)
    """,
    re.VERBOSE,
)
_LAST_WORD = re.compile(r"(?<!\w)[^\W\d_][\w.]*\Z")
_WORD = re.compile(r"\S+")
_SHORT_PARTS = re.compile(r"(?:[a-z]{1,2}\.)+[a-z]{1,2}\Z")  # e.g, i.e, u.s, ph.d
_TITLES = frozenset("al ca capt cf col dr gen gov lt maj mr mrs ms mt prof rep rev sen sgt st vs".split())
_NUMBERED = frozenset("art ch ed eq fig figs no nos op p pp sec vol vols".split())  # where a number follows
_LONGEST_WORD = 20  # characters before a dot that are searched for an abbreviation
_LONGEST_GAP = 20  # characters behind it that are searched for the next letter


def sentence_spans(text: str) -> list[Span]:
    """Find the sentences of a text.

    Args:
        text: any text.
    Returns: (start, end) of each, in order, without the spaces around it. Every character outside is a space.
    """
    spans, start = [], 0
    for match in _END.finditer(text):
        if match["dot"] is None or _ends_sentence(text, match.start(), match["dot"], match.end()):
            spans.append((start, match.end()))
            start = match.end()
    spans.append((start, len(text)))
    return [span for span in (stripped(text, *span) for span in spans) if span[0] < span[1]]


def word_spans(text: str, span: Span) -> list[Span]:
    """Find the words of a part of a text: what stands between spaces.

    Args:
        text: the whole text.
        span: the part.
    Returns: (start, end) of each in the whole text, in order.
    """
    return [match.span() for match in _WORD.finditer(text, *span)]


def stripped(text: str, start: int, end: int) -> Span:
    """Return (start, end) without the spaces at both ends of this part of a text."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, start + len(part.strip())


def _ends_sentence(text: str, dot: int, marks: str, end: int) -> bool:
    """Tell whether marks such as ``.`` or ``?!`` at ``dot``, with closing quotes up to ``end``, end a sentence."""
    following = text[end : end + _LONGEST_GAP].lstrip()[:1]
    if following.islower():
        return False
    word = _LAST_WORD.search(text, max(0, dot - _LONGEST_WORD), dot)
    if marks != "." or word is None:
        return True
    name = word[0].lower()
    is_initial = len(name) == 1 and word[0].isupper() and name != "i"
    return not (
        is_initial or name in _TITLES or _SHORT_PARTS.match(name) or (name in _NUMBERED and following.isdigit())
    )
