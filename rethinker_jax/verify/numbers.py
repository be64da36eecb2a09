"""Exact numbers out of text: integers, decimals, fractions, mixed numbers, scientific notation, number words.

A number is a `Fraction`, never a float: `0.0000001` and `0.0000004` differ, and so do `6.63e-34` and `1.6e-19`.
"""

import dataclasses
import re
from fractions import Fraction

from rethinker_jax.verify.normalize import closes_at_end, plain

MAX_EXPONENT = 400  # of ten; beyond it a text is not read as a number
MAX_NUMBER_CHARS = 400
MIN_ROUNDED_DIGITS = 4  # significant digits of a decimal that stands for an exact value: 0.3333 for 1/3


@dataclasses.dataclass(frozen=True)
class Number:
    """`decimals` counts the digits after the point (negative: zeros before it); None: written exactly."""

    value: Fraction
    decimals: int | None = None
    digits: int = 0  # significant digits of a decimal


_INTEGER = re.compile(r"[+-]?\d{1,400}")
_BODY = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?! ?\d)|\d+)(?:\.\d*)?|\.\d+"
_DECIMAL = re.compile(rf"([+-]?)\s*({_BODY})")
_POWER = r"10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?\s*\d+)\s*\}|\(\s*([+-]?\s*\d+)\s*\)|([+-]?\d+))"
_SCIENTIFIC = re.compile(rf"([+-]?)\s*({_BODY})\s*(?:(?:\\times|\\cdot|[x*])\s*{_POWER}|[eE]\s*([+-]?\d+))")
_TEN = re.compile(rf"([+-]?)\s*{_POWER}")
_FRACTION = re.compile(
    r"([+-]?)\s*\\frac\s*\{\s*([+-]?\s*[\d.,]+)\s*\}\s*\{\s*([+-]?\s*[\d.,]+)\s*\}|([+-]?)\s*(\d[\d,.]*)\s*/\s*([+-]?\d[\d,.]*)"
    r"|([+-]?)\s*\(\s*([+-]?\d[\d,.]*)\s*\)\s*/\s*\(\s*([+-]?\d[\d,.]*)\s*\)"
)
_MIXED = re.compile(
    r"([+-]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?: |-|\+|and)\s*(\d+)\s*/\s*(\d+))"
)
_REPEATING = re.compile(r"([+-]?)\s*(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?")
_DOTTED = re.compile(r"([+-]?)\s*(\d*)\.(\d*?)(?:(\d)\4{2,}|(\d\d+?)\5+)\s*\.\.\.")  # 0.1666..., 0.2727...
_NUMERIC_START = re.compile(r"[-+(]*\s*(?:\d|\.\d|\\frac)")

_ONE_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TEN_WORDS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ONES = {word: value for value, word in enumerate(_ONE_WORDS)}
_TENS = {word: 10 * value for value, word in enumerate(_TEN_WORDS, 2)}
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4} | {
    name + plural: size
    for size, name in enumerate(("third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), 3)
    for plural in ("", "s")
}
_SCALES = {"thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = re.compile(rf"([-+\d.,\s]+)({'|'.join(_SCALES)})")
NUMBER_WORDS = {*_ONES, *_TENS, *_SCALES, "hundred"}


def parse_integer(text: str) -> int | None:
    """The fast path: a bare integer of at most 400 digits."""
    return int(text) if _INTEGER.fullmatch(text) else None


def parse_number(text: str) -> Number | None:
    """The number that is the whole of `text` (cleaned), or None."""
    text = text.strip()
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if _INTEGER.fullmatch(text):
        return Number(Fraction(int(text)))
    while text.startswith("(") and closes_at_end(text):
        text = text[1:-1].strip()
    if re.match(r"[+-]\s*\(", text) and closes_at_end(text[1:].strip()):
        inner = parse_number(text[1:].strip()[1:-1])
        sign = -1 if text[0] == "-" else 1
        return inner and dataclasses.replace(inner, value=sign * inner.value)
    if not _NUMERIC_START.match(text):
        return parse_words(text)
    return _scaled(text) or _decimal(text) or _scientific(text) or _fraction(text) or _mixed(text) or _repeating(text)


def _sign(sign: str) -> int:
    return -1 if sign == "-" else 1


def _plain_decimal(body: str) -> Number:
    body = body.replace(",", "").replace(" ", "")
    whole, point, part = body.partition(".")
    value = Fraction(int((whole + part) or "0"), 10 ** len(part))
    if not point or not part:
        return Number(value)
    return Number(value, len(part), len((whole + part).lstrip("0")))


def _decimal(text: str) -> Number | None:
    match = _DECIMAL.fullmatch(text)
    if not match:
        return None
    number = _plain_decimal(match.group(2))
    return dataclasses.replace(number, value=_sign(match.group(1)) * number.value)


def _scaled(text: str) -> Number | None:
    """`1.5 million`."""
    match = _SCALED.fullmatch(text)
    number = _decimal(match.group(1).strip()) if match else None
    if match is None or number is None:
        return None
    scale = _SCALES[match.group(2)]
    decimals = None if number.decimals is None else number.decimals - len(str(scale)) + 1
    return dataclasses.replace(number, value=number.value * scale, decimals=decimals)


def _scientific(text: str) -> Number | None:
    match = _SCIENTIFIC.fullmatch(text)
    body, sign = "1", ""
    if match:
        sign, body = match.group(1), match.group(2)
        exponents = match.groups()[2:]
    else:
        match = _TEN.fullmatch(text)
        if not match:
            return None
        sign, exponents = match.group(1), match.groups()[1:]
    written = next(e for e in exponents if e is not None).replace(" ", "")
    exponent = int(written) if len(written) < 8 else MAX_EXPONENT + 1
    if abs(exponent) > MAX_EXPONENT:
        return None
    number = _plain_decimal(body)
    decimals = None if number.decimals is None else number.decimals - exponent
    return Number(_sign(sign) * number.value * Fraction(10) ** exponent, decimals, number.digits)


def _fraction(text: str) -> Number | None:
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, top, bottom = next(match.group(i, i + 1, i + 2) for i in (1, 4, 7) if match.group(i + 1) is not None)
    numerator, denominator = _decimal(top.strip(" ,.")), _decimal(bottom.strip(" ,."))
    if numerator is None or denominator is None or denominator.value == 0:
        return None
    return Number(_sign(sign) * numerator.value / denominator.value)


def _mixed(text: str) -> Number | None:
    match = _MIXED.fullmatch(text)
    if not match:
        return None
    top, bottom = (match.group(3), match.group(4)) if match.group(3) else (match.group(5), match.group(6))
    if int(bottom) == 0:
        return None
    return Number(_sign(match.group(1)) * (int(match.group(2)) + Fraction(int(top), int(bottom))))


def _repeating(text: str) -> Number | None:
    match = _REPEATING.fullmatch(text) or _DOTTED.fullmatch(text)
    if not match:
        return None
    sign, whole, fixed, *cycles = match.groups()
    cycle = next(c for c in cycles if c)
    value = Fraction(int((whole + fixed) or "0"), 10 ** len(fixed))
    value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    return Number(_sign(sign) * value)


def parse_words(text: str) -> Number | None:
    """`twenty-one`, `three hundred and five`, `minus two`, `a dozen`, `minus 3`, `two and a half` as a number."""
    words = re.sub(r"[-,]", " ", plain(text).lower()).split()
    if not words or len(words) > 16:
        return None
    sign = 1
    if words[0] in ("minus", "negative"):
        sign, words = -1, words[1:]
        if len(words) == 1 and (match := _DECIMAL.fullmatch(words[0])) and not match.group(1):
            number = _plain_decimal(match.group(2))
            return dataclasses.replace(number, value=-number.value)
    if words in (["a", "dozen"], ["dozen"], ["one", "dozen"]):
        return Number(Fraction(12 * sign))
    value = _cardinal(words)
    if value is None:
        value = _fraction_words(words)
    return None if value is None else Number(Fraction(sign * value))


def _fraction_words(words: list[str]) -> Fraction | None:
    """`half`, `three quarters`, `two and a half`."""
    if not words or words[-1] not in _PARTS:
        return None
    head = words[:-1]
    whole: int | None = 0
    if "and" in head:
        place = len(head) - 1 - head[::-1].index("and")
        whole, head = _cardinal(head[:place]), head[place + 1 :]
    count = 1 if head in ([], ["a"]) else _cardinal(head)
    return None if whole is None or count is None else whole + Fraction(count, _PARTS[words[-1]])


def _cardinal(words: list[str]) -> int | None:
    total = current = 0
    last = 10**18  # the size of the last word inside a group: sizes must fall ("five twenty" is no number)
    seen = False
    for word in words:
        if word == "and" and seen:
            continue
        if word in _ONES or word in _TENS:
            size = _ONES[word] if word in _ONES else _TENS[word]
            rank = 10 if word in _ONES else 100
            if rank >= last or (size > 9 and rank == 10 and last <= 100):
                return None
            current += size
            last = rank
        elif word == "hundred" and 0 < current < 10:
            current *= 100
            last = 1000
        elif word in _SCALES and current > 0:
            total += current * _SCALES[word]
            current, last = 0, 10**18
        else:
            return None
        seen = True
    return total + current if seen else None


def same_number(gold: Number, answer: Number) -> str | None:
    """The rule by which the two are the same number, or None.

    Exactly equal; or a decimal gold that the answer rounds to; or an exact, non-integer gold that rounds to the decimal
    answer of four or more significant digits. An integer gold wants the integer.
    """
    if gold.value == answer.value:
        return "equal"
    difference = abs(gold.value - answer.value)
    if difference * 50 > abs(gold.value):
        return None
    if gold.decimals is not None and gold.value.denominator != 1:
        if difference * 2 <= Fraction(10) ** -gold.decimals:
            return "rounded"
        return None
    if (
        gold.decimals is None
        and gold.value.denominator != 1
        and answer.decimals is not None
        and answer.digits >= MIN_ROUNDED_DIGITS
    ):
        return "rounded" if difference * 2 <= Fraction(10) ** -answer.decimals else None
    return None
