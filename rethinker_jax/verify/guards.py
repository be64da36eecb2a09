"""Size guards: what is refused by its looks, before any algebra sees it. The same text always gets the same answer.

A computer algebra system evaluates what it is given; `9^{9^{9^9}}` or a sum to a billion never ends. The bounds are far
above what an answer to a problem needs, and a text that breaks one can still be right by being the gold's very text.
"""

import re

MAX_CHARS = 512  # of one value: a number, an expression, an equation
MAX_LIST_CHARS = 4000  # of a list of values, or of text
MAX_TEXT_CHARS = 20_000  # of any answer or gold at all (lists of boxes are long)
MAX_NESTING = 24
MAX_PARSER_NESTING = 8  # of what goes to math-verify: its parser takes a second for 16 brackets
MAX_DIGITS = 40  # of one number
MAX_EXPONENT = 1024  # of a number with a number as its base
MAX_SYMBOLIC_EXPONENT = 40
MAX_TOWER = 3  # powers in each other's exponents: e^{e^{e^x}}
MAX_FACTORIAL = 160
MAX_ARGUMENTS = 24  # commas of one expression
MAX_OPERATORS = 120
MAX_ITEMS = 64  # of a set, tuple or matrix
MAX_STRUCTURE_NESTING = 4  # of lists, sets and tuples in each other
MAX_REWRITTEN = 24  # items of a set or list that are written otherwise than the gold's: each is compared with each
MAX_CHOICES = 64

_FORBIDDEN = re.compile(
    r"\\(?:sum|prod|coprod|i*int|oint|lim|limsup|liminf|bigcup|bigcap|Gamma|zeta|det|gcd|lcm|max|min|sup|inf|forall|exists|"
    r"input|include|write|def|let|newcommand|csname|catcode)(?![a-zA-Z])"
)
_DIGITS = re.compile(rf"\d[\d,.]{{{MAX_DIGITS},}}")
_TEN_TO = re.compile(r"[eE]\s*[-+]?\d{4,}")  # parsers take it for a power of ten
_FACTORIAL = re.compile(r"(\S?)\s*!")
_NUMBER_FACTORIAL = re.compile(r"(\d+)\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{?\s*(\d+)")
_OPERATOR = re.compile(r"[-+*/^=<>&]|\\(?:cdot|times|div|frac|sqrt|pm|cup|cap)")
_CHAIN = re.compile(rf"(?:\\[a-zA-Z]+\s*){{{MAX_NESTING},}}")  # \sin\sin\sin...: every command takes the next
_SYMBOLIC_BASE = re.compile(r"[a-zA-Z)}\]]\s*$")
_EXPONENT = re.compile(r"\s*[-+]?(?:\d+(?:\.\d+)?|\\[a-zA-Z]+|.)?")
_CARET = re.compile(r"\s*\^")
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")


def refusal(text: str) -> str | None:
    """The name of the guard that keeps `text` away from algebra, or None when it may pass."""
    if len(text) > MAX_CHARS:
        return "length"
    if nesting(text) > MAX_NESTING or text.count("|") > MAX_NESTING or _CHAIN.search(text):
        return "nesting"
    if _DIGITS.search(text):
        return "digits"
    if _TEN_TO.search(text):
        return "exponent"
    if len(_OPERATOR.findall(text)) > MAX_OPERATORS:
        return "operators"
    if text.count(",") > MAX_ARGUMENTS:
        return "arguments"
    if _FORBIDDEN.search(text):
        return "operation"
    if any(not c.isprintable() for c in text):
        return "characters"
    return _factorial(text) or _powers(text)


def nesting(text: str) -> int:
    """How deep brackets stand in each other."""
    depth = deepest = 0
    for c in text:
        if c in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif c in "})]":
            depth -= 1
    return deepest


def _factorial(text: str) -> str | None:
    if any(int(n) > MAX_FACTORIAL for n in _BINOMIAL.findall(text)):
        return "binomial"
    if "!" not in text:
        return None
    if any(not before.isdigit() for before in _FACTORIAL.findall(text)):
        return "factorial"  # of a group, of a factorial, of a letter
    return "factorial" if any(int(n) > MAX_FACTORIAL for n in _NUMBER_FACTORIAL.findall(text)) else None


def _powers(text: str) -> str | None:
    """Refuses towers of numbers and exponents that are large for what they stand on."""
    if _tower_height(text) > MAX_TOWER:
        return "tower"
    totals: dict[int, int] = {}  # of every `^`: its exponent times the largest that its base holds
    for match in re.finditer(r"\^", text):
        exponent = _argument(text, match.end())
        numbers = [abs(int(n)) for n in re.findall(r"\d+", exponent)]
        largest = max(numbers, default=0)
        if "^" in exponent and (not _LETTER.search(exponent) or largest > 3):
            return "tower"
        if "!" in exponent:
            return "tower"
        symbolic = bool(_SYMBOLIC_BASE.search(text[: match.start()]))
        if largest > (MAX_SYMBOLIC_EXPONENT if symbolic else MAX_EXPONENT):
            return "exponent"
        base = _group_before(text, match.start())
        held = max((total for at, total in totals.items() if at in base), default=1)
        totals[match.start()] = total = held * max(largest, 1)
        if held > 1 and total > MAX_EXPONENT:  # ((10^9)^9)^9
            return "exponent"
        before = re.search(r"(\d+)\s*$", text[: match.start()])
        if before and len(before.group(1)) * largest > 2 * MAX_EXPONENT:
            return "exponent"
    return None


def _tower_height(text: str) -> int:
    heights: dict[int, int] = {}  # of every `^`
    for match in reversed(list(re.finditer(r"\^", text))):
        end = match.end() + len(_argument(text, match.end()))
        heights[match.start()] = 1 + max((height for at, height in heights.items() if at < end), default=0)
    return max(heights.values(), default=0)


def _group_before(text: str, end: int) -> range:
    """The places of the group that ends before `end`; empty where none does."""
    end = len(text[:end].rstrip())
    depth = 0
    for at in range(end - 1, -1, -1):
        depth += (text[at] in ")]}") - (text[at] in "([{")
        if depth <= 0:
            return range(at, end - 1)
    return range(0, end)


def _argument(text: str, start: int) -> str:
    """What follows a `^`: a group with its balanced braces, a chain of further powers, or one token."""
    end = start
    while end < len(text):
        while end < len(text) and text[end] == " ":
            end += 1
        if end < len(text) and text[end] in "{(":
            close = {"{": "}", "(": ")"}[text[end]]
            depth = 0
            opened = text[end]
            while end < len(text):
                depth += (text[end] == opened) - (text[end] == close)
                end += 1
                if depth == 0:
                    break
        else:
            token = _EXPONENT.match(text, end)
            end = token.end() if token and token.end() > end else end + 1
        power = _CARET.match(text, end)
        if power is None:
            break
        end = power.end()
    return text[start:end]
