"""Words, edit distance and longest common subsequence of untrusted text, bounded in time.

Both distances are computed with whole rows of the table as the bits of one integer: edit distance by Myers (1999, JACM
46) in Hyyrö's form (2003), the subsequence by Hyyrö (2004). A row costs a few operations on integers of `len(left)`
bits, so that 4,000 by 4,000 words take about 10 ms.
"""

import re
from collections.abc import Hashable, Sequence

MAX_WORDS = 4096  # of what is compared; the terms refuse more
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; a kana or Chinese character is a word of its own."""
    return _WORD.findall(text.lower())


def edit_distance(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """The least number of insertions, deletions and replacements that make one sequence the other."""
    if not left or not right:
        return max(len(left), len(right))
    places = _places(left)
    everything = (1 << len(left)) - 1
    top = 1 << (len(left) - 1)
    above, below, distance = everything, 0, len(left)  # where the column rises and falls by one
    for item in right:
        equal = places.get(item, 0)
        diagonal = (((equal & above) + above) ^ above) | equal | below
        rises = below | (everything & ~(diagonal | above))
        falls = above & diagonal
        distance += bool(rises & top) - bool(falls & top)
        rises = (rises << 1) | 1
        falls <<= 1
        above = (falls | ~(diagonal | rises)) & everything
        below = rises & diagonal & everything
    return distance


def common_subsequence(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence."""
    places = _places(left)
    everything = (1 << len(left)) - 1
    row = everything
    for item in right:
        matched = row & places.get(item, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(left) - row.bit_count()


def _places(items: Sequence[Hashable]) -> dict[Hashable, int]:
    """Item → the places at which it stands, as bits."""
    places: dict[Hashable, int] = {}
    for place, item in enumerate(items):
        places[item] = places.get(item, 0) | 1 << place
    return places
