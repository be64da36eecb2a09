"""Answers that are words: short text, yes/no, dates and times, bearings, ratios, chemical formulas, numbers in a base.

Text is compared whole: case, articles and punctuation are free, every other word counts. There is no fuzzy matching.
"""

import re
from fractions import Fraction
from math import gcd

from rethinker_jax.verify.normalize import clean, plain
from rethinker_jax.verify.numbers import NUMBER_WORDS, parse_words

_LEAD = re.compile(
    r"^(?:so |therefore |thus |hence )*(?:(?:the |my |our )?(?:final |correct )?(?:answer|result|solution)(?: is|:)\s*"
    r"|it is |it's |this is |there (?:is|are) )",
    re.IGNORECASE,
)
_ARTICLES = {"a", "an", "the"}
_POLARITY = {
    "yes": True,
    "true": True,
    "yeah": True,
    "yep": True,
    "correct": True,
    "no": False,
    "false": False,
    "nope": False,
    "incorrect": False,
}
_DOUBT = {
    "or",
    "maybe",
    "perhaps",
    "possibly",
    "unsure",
    "unknown",
    "sure",
    "and",
    "neither",
    "both",
    "depends",
    "cannot",
}


def text_key(text: str) -> str:
    """What is compared of a text: lower case words and digits without articles, `two` as `2`."""
    text = _LEAD.sub("", plain(clean(text)))
    text = re.sub(r"(?<=\w)'(?=s\b)|(?<=s)'(?=\s)", "", text)
    text = re.sub(r"[-_/]+(?=[a-zA-Z])", " ", text.lower())
    words = re.findall(r"\\[a-z]+|[-+]?\d+(?:[.,]\d+)*|[^\W\d_]+|[%°$€£=<>+^#&]", text)
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(str(_digits(word)) if word in NUMBER_WORDS else word for word in kept)


def _digits(word: str) -> str:
    number = parse_words(word)
    return word if number is None else str(number.value)


def same_text(gold: str, answer: str) -> bool:
    """Equal up to case, articles and punctuation; geometric names (`\\angle ABC`) up to how they may be read."""
    left, right = geometric_name(gold), geometric_name(answer)
    if left and not right and re.fullmatch("[A-Z]{2}", plain(answer)):
        right = geometric_name(f"\\{left[0]} {plain(answer)}")  # the mark above the letters left out
    if right and not left and re.fullmatch("[A-Z]{2}", plain(gold)):
        left = geometric_name(f"\\{right[0]} {plain(gold)}")
    if left or right:
        return left == right
    key = text_key(gold)
    return bool(key) and key == text_key(answer)


_FIGURES = {
    "segment": "overline", "line segment": "overline", "side": "overline", "chord": "overline", "diagonal": "overline",
    "line": "overleftrightarrow", "ray": "overrightarrow", "arc": "widehat", "vec": "overrightarrow",
}  # fmt: skip
_GEOMETRY = re.compile(
    r"\s*(?:m\s*)?\\?(angle|triangle|overline|overrightarrow|overleftrightarrow|widehat|vec|square"
    r"|(?:line )?segment|side|chord|diagonal|line|ray|arc)\s*\{?\s*([A-Z][A-Z0-9']*)\s*\}?\s*"
)


def geometric_name(text: str) -> tuple[str, str] | None:
    """(figure, canonical letters) of `\\angle ABC`: an angle may be read from both ends, a triangle from any corner."""
    match = _GEOMETRY.fullmatch(plain(clean(text)))
    if not match:
        return None
    figure, letters = match.groups()
    figure = _FIGURES.get(figure, figure)
    if figure in ("angle", "overline", "overleftrightarrow", "widehat"):
        letters = min(letters, letters[::-1])
    elif figure == "triangle":
        letters = "".join(sorted(letters))
    return figure, letters


_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are) |it has )?(?:no|zero) solutions?(?: exists?)?|(?:the )?(?:empty|null) set|\\emptyset"
)


def is_empty_set(text: str) -> bool:
    """`\\emptyset`, `no solution`, `the empty set`."""
    return bool(_NO_SOLUTION.fullmatch(plain(text).lower().strip(" .")))


_POLARITY_END = re.compile(
    r"\s*(?:$|[,;:!(]|\.(?!\s*\d)|\s?-(?=\s|because|since|it|the)|\s(?:because|since|as|it|it's|they|he|she|this|that|there|the)\b)"
)
_CONDITION = re.compile(
    r"\b(?:if|unless|when|whenever|only (?:if|when|where|for|in|on|sometimes)|provided|assuming|except|but|however)\b"
)
_NOT_SURE = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|unsure|unknown|not sure|not certain|depends?|no idea|not know|don't know"
    r"|guess|(?:cannot|can't|can not) (?:tell|say|be))\b"
)


def polarity(text: str) -> bool | None:
    """True for yes/true, False for no/false, None for what is neither, both, doubtful or on a condition.

    `No idea` and `no solution` are no `no`: only a mark, a reason or a subject may follow.
    """
    text = _LEAD.sub("", plain(clean(text))).lower()
    words = re.findall(r"[a-z']+", text)
    if not words or words[0] not in _POLARITY or len(words) > 40:
        return None
    first, rest = _POLARITY[words[0]], words[1:]
    after = text.partition(words[0])[2]
    if not _POLARITY_END.match(after) or _NOT_SURE.search(after):
        return None
    if _CONDITION.search(re.split(r"\b(?:because|since)\b", after)[0]):  # a reason may have conditions
        return None
    if any(word in _DOUBT for word in rest[:3]) or any(word in _POLARITY and _POLARITY[word] != first for word in rest):
        return None
    return first


def is_yes_no(text: str) -> bool:
    return plain(text).lower().rstrip(".!") in ("yes", "no", "true", "false")


_ELEMENTS = set(
    re.findall(
        "[A-Z][a-z]?",
        "HHeLiBeBCNOFNeNaMgAlSiPSClArKCaScTiVCrMnFeCoNiCuZnGaGeAsSeBrKrRbSrYZrNbMoTcRuRhPdAgCdInSnSbTeIXeCsBaLaCePr"
        "NdPmSmEuGdTbDyHoErTmYbLuHfTaWReOsIrPtAuHgTlPbBiPoAtRnFrRaAcThPaUNpPuAmCm",
    )
)
_ARROWS = re.compile(r"\\(?:to|rightarrow|longrightarrow|Rightarrow|xrightarrow(?:\{[^{}]*\})?)(?![a-zA-Z])|-+>|=+>")
_EQUILIBRIUM = re.compile(r"\\(?:rightleftharpoons|leftrightarrow)(?![a-zA-Z])|<-*=*>")


_LAST_SIGN = re.compile(r"(?<=[A-Za-z)\]])(\d*[+-])(?=\s|$)")  # inside \ce: `OH-`, `Ca2+`


def chem_key(text: str) -> str:
    """A formula or reaction without print marks: case kept, subscripts as digits, charges `^2+`, arrows `→`."""
    text = plain(clean(text))
    text = re.sub(r"\\ce\s*\{(.*)\}", lambda m: _LAST_SIGN.sub(r"^\1", m.group(1)), text)
    text = _EQUILIBRIUM.sub("⇌", text)
    text = _ARROWS.sub("→", text)
    text = re.sub(r"\\(?:uparrow|downarrow)|\((?:aq|s|l|g)\)|_\{?\((?:aq|s|l|g)\)\}?", "", text)
    text = re.sub(r"_\s*\{?\s*(\d+)\s*\}?", r"\1", text)
    text = re.sub(
        r"\^\s*\{?\s*(\d*)\s*([+-])\s*(\d*)\s*\}?",
        lambda m: (
            "^"
            + (m.group(1) or m.group(3)).replace("1", "", 1 if (m.group(1) or m.group(3)) == "1" else 0)
            + m.group(2)
        ),
        text,
    )
    return re.sub(r"\s+|\\cdot", "", text)


def is_chemistry(text: str) -> bool:
    """A reaction, or a formula of two or more elements or with an index: `NaCl`, `H_2O`, `SO_4^{2-}`."""
    key = chem_key(text)
    if len(key) > 200 or not key:
        return False
    sides = re.split("[→⇌]", key)
    terms = [term for side in sides for term in re.split(r"(?<!\^)(?<!\^\d)\+", side)]
    if not all(_formula(term) for term in terms):
        return False
    if len(sides) > 1:
        return True
    symbols = re.findall(r"[A-Z][a-z]?", key)
    return (
        len(terms) == 1
        and (len(symbols) >= 2 or "^" in key or bool(re.search(r"[A-Z][a-z]?\d", key)))
        and key != key.lower()
    )


def _formula(term: str) -> bool:
    body = re.fullmatch(
        r"\d*((?:[A-Z][a-z]?\d*|\((?:[A-Z][a-z]?\d*)+\)\d*|\[(?:[A-Z][a-z]?\d*|\((?:[A-Z][a-z]?\d*)+\)\d*)+\])+)(?:\^\d?[+-])?",
        term,
    )
    return bool(body) and all(symbol in _ELEMENTS for symbol in re.findall(r"[A-Z][a-z]?", body.group(1)))


def is_symbol(text: str) -> bool:
    """An element of two letters that is no English word: its case matters (`Co` is not `CO`)."""
    return len(text) == 2 and text in _ELEMENTS and text not in ("He", "In", "As", "At", "Be", "No", "Am")


def same_reaction(gold: str, answer: str) -> bool:
    """Formulas by their text, reactions side by side, the terms of a side in any order."""
    left, right = chem_key(gold), chem_key(answer)
    if left == right:
        return bool(left)
    for arrow in "⇌→":
        if left.count(arrow) == 1 and right.count(arrow) == 1:
            return all(
                sorted(re.split(r"(?<!\^)(?<!\^\d)\+", a)) == sorted(re.split(r"(?<!\^)(?<!\^\d)\+", b))
                for a, b in zip(left.split(arrow), right.split(arrow), strict=True)
            )
    return False


_RATIO = re.compile(r"\s*([\d.,]+(?:\s*/\s*\d+)?)(\s*(?::|\\colon|to)\s*[\d.,]+(?:\s*/\s*\d+)?)+\s*")


def parse_ratio(text: str) -> tuple[Fraction, ...] | None:
    """The parts of `2:4`, `1 to 2`, `1:2:3`, reduced so that equal ratios are equal tuples."""
    text = plain(text)
    if not _RATIO.fullmatch(text) or len(text) > 100:
        return None
    try:
        parts = [Fraction(part.replace(",", "").replace(" ", "")) for part in re.split(r":|to", text)]
    except (ValueError, ZeroDivisionError):
        return None
    if not any(parts):
        return None
    common = parts[0]
    for part in parts[1:]:
        common = Fraction(
            gcd(common.numerator * part.denominator, part.numerator * common.denominator),
            common.denominator * part.denominator,
        )
    return tuple(part / common for part in parts) if common else None


_MONTH_NAMES = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_MONTHS = {name: number for number, name in enumerate(_MONTH_NAMES, 1)}
_CLOCK = re.compile(r"(\d{1,2})[:.](\d{2})(?:[:.](\d{2}))?\s*(a\.?m\.?|p\.?m\.?|o'clock|hours|hrs|h)?")
_SPOKEN = re.compile(
    r"(half|quarter|a quarter|five|ten|twenty|twenty-five|(?:[a-z-]+|\d{1,2})(?= minutes))(?: minutes)?"
    r" (past|to) ([a-z]+|\d{1,2})(?: o'clock)?"
)
_HOUR = re.compile(r"(\d{1,2})\s*(a\.?m\.?|p\.?m\.?|o'clock)")


def parse_time(text: str, bare: bool = True) -> tuple[int, int, bool] | None:
    """(seconds since midnight, whether am or pm is settled, from hh:mm) of a clock time; `bare` allows `3:30` alone."""
    text = plain(text).lower().strip()
    if text in ("noon", "midday"):
        return 43200, 1, True
    if text == "midnight":
        return 0, 1, True
    spoken = _SPOKEN.fullmatch(text)
    if spoken:
        minutes = {"half": 30, "quarter": 15, "a quarter": 15}.get(spoken.group(1)) or _whole(spoken.group(1))
        hour = _whole(spoken.group(3))
        if minutes is None or hour is None or not (0 < minutes < 60 and 1 <= hour <= 12):
            return None
        return (hour * 60 + (minutes if spoken.group(2) == "past" else -minutes)) * 60 % 43200, 0, True
    match = _CLOCK.fullmatch(text)
    if match:
        hour, minute, second, half = (
            int(match.group(1)),
            int(match.group(2)),
            int(match.group(3) or 0),
            match.group(4) or "",
        )
    else:
        match = _HOUR.fullmatch(text)
        if not match:
            return None
        hour, minute, second, half = int(match.group(1)), 0, 0, match.group(2)
    if not half and not bare:
        return None
    half = half.replace(".", "")
    if hour > 24 or minute > 59 or second > 59:
        return None
    if half in ("am", "pm"):
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half == "pm" else 0)
    return hour * 3600 + minute * 60 + second, int(half in ("am", "pm") or hour > 12 or hour == 0), True


def _whole(text: str) -> int | None:
    number = parse_words(text)
    if number is None:
        return int(text) if text.isdigit() else None
    return int(number.value)


def same_time(gold: str, answer: str) -> bool | None:
    """None where the gold is no clock time. am or pm may be missing on one side, never contradict."""
    left = parse_time(gold)
    if left is None:
        return None
    right = parse_time(answer)
    if right is None:
        return False
    if left[0] == right[0]:
        return True
    return (not left[1] or not right[1]) and left[0] % 43200 == right[0] % 43200


def parse_date(text: str) -> tuple[int, int, int] | None:
    """(year, month, day) of `March 5, 2020`, `5 March`, `2020-03-05`, 0 for what is not said; `3/5/2020`: None."""
    text = plain(text).lower().strip().rstrip(".")
    iso = re.fullmatch(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})", text)
    if iso:
        return _valid_date(int(iso.group(1)), int(iso.group(2)), int(iso.group(3)))
    text = re.sub(r"^(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+", "", text)
    match = re.fullmatch(r"([a-z]{3,9})\.?\s+(\d{1,2})(?:st|nd|rd|th)?(?:,?\s+(\d{4}))?", text)
    if match:
        return _named_date(match.group(1), match.group(2), match.group(3))
    match = re.fullmatch(r"(?:the\s+)?(\d{1,2})(?:st|nd|rd|th)?\s+(?:of\s+)?([a-z]{3,9})\.?(?:,?\s+(\d{4}))?", text)
    if match:
        return _named_date(match.group(2), match.group(1), match.group(3))
    match = re.fullmatch(r"([a-z]{3,9})\.?,?\s+(\d{4})", text)
    return _named_date(match.group(1), "0", match.group(2)) if match else None


def _named_date(name: str, day: str, year: str | None) -> tuple[int, int, int] | None:
    months = [
        number for month, number in _MONTHS.items() if month == name or (len(name) in (3, 4) and month.startswith(name))
    ]
    return _valid_date(int(year or 0), months[0], int(day)) if len(months) == 1 else None


def _valid_date(year: int, month: int, day: int) -> tuple[int, int, int] | None:
    return (year, month, day) if 1 <= month <= 12 and 0 <= day <= 31 else None


_QUADRANT = re.compile(r"([ns])\s*(\d+(?:\.\d+)?)\s*°?\s*([ew])")
_OF = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?:°|degrees)?\s*(north|south|east|west|[nsew])\s+of\s+(north|south|east|west|[nsew])"
)
_THREE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*°?\s*t")
_LEADING_ZERO = re.compile(r"(0\d\d(?:\.\d+)?)\s*°?")
_COMPASS = {
    "northeast": 45,
    "southeast": 135,
    "southwest": 225,
    "northwest": 315,
    "ne": 45,
    "se": 135,
    "sw": 225,
    "nw": 315,
}
_AXIS = {"n": 0, "e": 90, "s": 180, "w": 270}


def parse_bearing(text: str) -> Fraction | None:
    """Clockwise degrees from north: `N 30° E`, `30° east of north`, `030°`, `330°T`, `north-east`, `NE`; None else."""
    point = re.sub(r"[\s-]+", "", plain(text))
    if point.lower() in _COMPASS and (len(point) > 2 or point.isupper()):
        return Fraction(_COMPASS[point.lower()])
    text = plain(text).lower().replace("°", "° ").replace("  ", " ").strip()
    text = re.sub(r"\s*°\s*", "° ", text).strip()
    true = _THREE.fullmatch(text) or _LEADING_ZERO.fullmatch(text)
    if true:
        return Fraction(true.group(1)) % 360
    quadrant, relative = _QUADRANT.fullmatch(text), _OF.fullmatch(text)
    if quadrant:
        start, angle, towards = _AXIS[quadrant.group(1)], Fraction(quadrant.group(2)), _AXIS[quadrant.group(3)]
    elif relative:
        start, angle, towards = _AXIS[relative.group(3)[0]], Fraction(relative.group(1)), _AXIS[relative.group(2)[0]]
    else:
        return None
    turn = (towards - start) % 360
    if turn not in (90, 270) or angle > 90:
        return None
    return (start + angle if turn == 90 else start - angle) % 360


_BASE = re.compile(r"([0-9A-F]+)\s*_\s*\{?\s*\(?(\d{1,2}|two|eight|ten|sixteen)\)?\s*\}?")


def parse_base(text: str) -> tuple[str, str] | None:
    """(digits, base) of `204_5`, or None."""
    match = _BASE.fullmatch(plain(text))
    return (match.group(1), match.group(2)) if match else None
