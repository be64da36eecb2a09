"""Numbers with or without units: the comparison behind the kinds number, percent, fraction, units and count."""

import dataclasses
import re
from fractions import Fraction

from rethinker_jax.verify.normalize import clean, plain, split_name
from rethinker_jax.verify.numbers import NUMBER_WORDS, Number, parse_number, same_number
from rethinker_jax.verify.units import Unit, contradiction, parse_unit


@dataclasses.dataclass(frozen=True)
class Quantity:
    number: Number
    unit: Unit


_LEAD = re.compile(
    r"^(?:(?:the|answer|final|value|result|total|number|year|is|are|it|there|there's|of|equals?|a|about|approximately|approx|roughly|around"
    r"|nearly|circa|so|therefore|hence|thus)(?:\s|:)\s*|\\(?:therefore|approx|sim|simeq|cong)(?![a-zA-Z])\s*|[≈~=:]\s*)+",
    re.IGNORECASE,
)
_CURRENCY = re.compile(r"([+-]?)\s*(US\$|[$€£¥₹]|USD|EUR|GBP|Rs\.?)\s*([+-]?.*)", re.DOTALL)
_NUMBER_PREFIX = re.compile(
    r"[+-]?\s*(?:"
    r"\d+\s*\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}|\d+ \d+\s*/\s*\d+(?![\d.])"
    r"|\\frac\s*\{\s*[+-]?[\d.,]+\s*\}\s*\{\s*[\d.,]+\s*\}"
    r"|10\s*\^\s*(?:\{[^{}]*\}|[+-]?\d+)"
    r"|(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d)|\d+)(?:\.\d+|\.(?!\d))?|\.\d+)"
    r"(?:\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*(?:\{[^{}]*\}|[+-]?\d+)|[eE][+-]?\d+(?![a-zA-Z]))?(?:\s*/\s*\d+(?:\.\d+)?)?)"
    r"(?:\s*(?:thousand|million|billion|trillion)\b)?"
)
_SINGLE = re.compile(r"[a-zA-Z]")


def parse_quantity(text: str, lenient_unit: bool = False) -> Quantity | None:
    """The number and unit that are the whole of a cleaned text, or None.

    A one-letter unit stuck to its number (`5m`) counts only where `lenient_unit` says that a quantity is wanted.
    """
    number = parse_number(text)
    if number is not None:
        return Quantity(number, Unit())
    bare = _LEAD.sub("", plain(text), count=1) if not text[:1].isdigit() else plain(text)
    currency = _CURRENCY.fullmatch(bare)
    if currency:
        number = parse_number(currency.group(1) + re.sub(r"\s*(?:dollars|USD)$", "", currency.group(3).strip()))
        symbol = currency.group(2).replace("US", "") or "$"
        unit = parse_unit("$" if symbol == "D" else symbol)
        return Quantity(number, unit) if number and unit and unit.known else None
    number = parse_number(bare)
    if number is not None:
        return Quantity(number, Unit())
    return _twice(bare) or _compound(bare) or _with_unit(bare, lenient_unit) or _words_with_unit(bare)


def _twice(text: str) -> Quantity | None:
    """`four (4)`: the same number in words and in digits."""
    match = re.fullmatch(r"([^()]{1,40})\s*\(([^()]{1,40})\)", text)
    if not match:
        return None
    numbers = [parse_number(part.strip()) for part in match.groups()]
    first, second = numbers
    return Quantity(first, Unit()) if first and second and first.value == second.value else None


def _with_unit(text: str, lenient_unit: bool) -> Quantity | None:
    prefix = _NUMBER_PREFIX.match(text)
    if not prefix:
        return None
    rest = text[prefix.end() :]
    number = parse_number(prefix.group().strip())
    if number is None or not rest.strip():
        return None
    stripped = rest.strip()
    if stripped[0] in "+*^(\\=<>,;:!|[{_" and not stripped.startswith(("\\text", "\\Omega", "\\mu", "\\frac", "(")):
        return None
    unit = parse_unit(stripped)
    if unit is None:
        return None
    lone = _SINGLE.fullmatch(stripped) or re.fullmatch(r"[a-zA-Z]\^?\{?\d?\}?", stripped)
    if unit.label and not rest.startswith(" ") and re.fullmatch(r"[a-z]{2,3}", stripped):
        return None  # 2ab is a product
    if lone and not lenient_unit and not rest.startswith(" "):
        return None
    return Quantity(number, unit)


def _words_with_unit(text: str) -> Quantity | None:
    """`twenty five cm`, `three apples`: the longest prefix of number words, then the unit."""
    words = text.split()
    count = 0
    while count < len(words) and all(part in NUMBER_WORDS for part in words[count].lower().split("-")):
        count += 1
    if count == 0 or count == len(words):
        return None
    number, unit = parse_number(" ".join(words[:count])), parse_unit(" ".join(words[count:]))
    return Quantity(number, unit) if number and unit is not None else None


def _compound(text: str) -> Quantity | None:
    """`3 hours 30 minutes`, `5 ft 6 in`: parts of one dimension, each unit smaller than the last, in base units.

    `45°30'` too, in degrees.
    """
    angle = re.fullmatch(r"(\d+)\s*°\s*(\d{1,2})\s*'\s*(?:(\d{1,2})\s*(?:''|\"))?", text)
    if angle:
        degrees, minutes, seconds = (int(part or 0) for part in angle.groups())
        return Quantity(Number(degrees + Fraction(minutes, 60) + Fraction(seconds, 3600)), parse_unit("°") or Unit())
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+\.?)", text)
    if len(parts) < 2 or len(parts) > 4:
        return None
    if re.sub(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+\.?)|\band\b|[\s,]", "", text):
        return None
    total = Fraction(0)
    last: Unit | None = None
    for value, name in parts:
        unit = parse_unit(name.removesuffix("and"))
        if unit is None or not unit.dimension:
            return None
        if last is not None and (unit.dimension != last.dimension or unit.scale >= last.scale):
            return None
        total += Fraction(value) * unit.scale
        last = unit
    return Quantity(Number(total), Unit(last.dimension)) if last else None


def same_quantity(gold: Quantity, answer: Quantity) -> tuple[bool, str]:
    """Whether two quantities agree, and the rule that decided (see the policy in `judge`)."""
    left, right = gold.unit, answer.unit
    if left.percent or right.percent:
        return _same_percent(gold, answer)
    if why := contradiction(left, right):
        return False, why
    if left.known and right.known and left.scale != right.scale:
        factor = right.scale / left.scale
        converted = Number(answer.number.value * factor, None, answer.number.digits)
        rule = same_number(gold.number, converted)
        return (True, "unit_converted") if rule else (False, "unit_differs")
    rule = same_number(gold.number, answer.number)
    return (True, f"number_{rule}") if rule else (False, "number_differs")


def _same_percent(gold: Quantity, answer: Quantity) -> tuple[bool, str]:
    """25% is 0.25; the sign may be missing on one side, unless the bare number is a share (0.25 is not 0.25%)."""
    if gold.unit.percent and answer.unit.percent:
        rule = same_number(gold.number, answer.number)
        return (True, f"percent_{rule}") if rule else (False, "percent_differs")
    percent, bare = (gold, answer) if gold.unit.percent else (answer, gold)
    if bare.unit.known:
        return False, "unit_dimension"
    scaled = Number(
        percent.number.value / 100, None if percent.number.decimals is None else percent.number.decimals + 2
    )
    pair = (scaled, bare.number) if gold.unit.percent else (bare.number, scaled)
    if same_number(*pair):
        return True, "percent_of_one"
    if abs(bare.number.value) >= 1 and same_number(gold.number, answer.number):
        return True, "percent_sign_missing"
    return False, "percent_differs"


def gold_quantity(text: str) -> Quantity | None:
    """The quantity of a gold answer, its `name =` dropped."""
    return parse_quantity(split_name(clean(text))[1])
