"""Text of others where people read it: an escape sequence could hide, move or rewrite what a terminal or page shows."""

import re

# Control characters but newline and tab, what changes the direction of text or is not seen, and halves of characters.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with such characters written out, as in `\x1b[2J` and `\u202e`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
