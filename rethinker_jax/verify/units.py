"""Units of measurement: what dimension a unit has and how large it is, exactly.

A unit may be missing on one side. Two units of one dimension are the same answer only when the converted values agree;
different dimensions never are. Words that are no unit (`apples`) are labels and must not contradict each other.
"""

import dataclasses
import re
from fractions import Fraction
from functools import lru_cache

from rethinker_jax.verify.normalize import plain
from rethinker_jax.verify.numbers import NUMBER_WORDS

Dimension = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """`scale` of one unit in base units; `label` is set, lower case and singular, for words that are no unit."""

    dimension: Dimension = ()
    scale: Fraction = Fraction(1)
    label: str = ""
    percent: bool = False

    @property
    def known(self) -> bool:
        return bool(self.dimension) or self.percent


# name → (dimension, scale); names of two and more letters may stand without a space before them.
_TABLE: dict[str, tuple[dict[str, int], Fraction]] = {}


def _add(names: str, dimension: dict[str, int], scale: Fraction | int | str = 1) -> None:
    for name in names.split():
        _TABLE[name] = (dimension, Fraction(scale))


_LENGTH, _MASS, _TIME = {"length": 1}, {"mass": 1}, {"time": 1}
_add("m meter meters metre metres", _LENGTH)
_add("km kilometer kilometers kilometre kilometres", _LENGTH, 1000)
_add("dm decimeter decimeters", _LENGTH, "1/10")
_add("cm cms centimeter centimeters centimetre centimetres", _LENGTH, "1/100")
_add("mm millimeter millimeters millimetre millimetres", _LENGTH, "1/1000")
_add("μm um micrometer micrometers micron microns", _LENGTH, "1/1000000")
_add("nm nanometer nanometers", _LENGTH, "1/1000000000")
_add("in inch inches", _LENGTH, "127/5000")
_add("ft foot feet", _LENGTH, "381/1250")
_add("yd yard yards", _LENGTH, "1143/1250")
_add("mi mile miles", _LENGTH, "201168/125")
_add("kg kilogram kilograms", _MASS)
_add("g gram grams gm", _MASS, "1/1000")
_add("mg milligram milligrams", _MASS, "1/1000000")
_add("t ton tons tonne tonnes", _MASS, 1000)
_add("lb lbs pound pounds", _MASS, "45359237/100000000")
_add("oz ounce ounces", _MASS, "45359237/1600000000")
_add("s sec secs second seconds", _TIME)
_add("ms millisecond milliseconds", _TIME, "1/1000")
_add("μs us microsecond microseconds", _TIME, "1/1000000")
_add("min mins minute minutes", _TIME, 60)
_add("h hr hrs hour hours", _TIME, 3600)
_add("day days", _TIME, 86400)
_add("week weeks wk", _TIME, 604800)
_add("month months", {"month": 1})
_add("year years yr yrs", {"month": 1}, 12)
_add("L l liter liters litre litres", {"length": 3}, "1/1000")
_add("mL ml milliliter milliliters millilitre millilitres cc", {"length": 3}, "1/1000000")
_add("gal gallon gallons", {"gallon": 1})
_add("acre acres", {"acre": 1})
_add("hectare hectares ha", {"length": 2}, 10000)
_add("° deg degree degrees", {"degree": 1})
_add("rad rads radian radians", {"radian": 1})
_add("°C C_deg celsius", {"celsius": 1})
_add("°F F_deg fahrenheit", {"fahrenheit": 1})
_add("K kelvin kelvins", {"kelvin": 1})
_add("$ dollar dollars USD usd", {"dollar": 1})
_add("cent cents ¢", {"dollar": 1}, "1/100")
_add("€ euro euros EUR", {"euro": 1})
_add("£ GBP", {"sterling": 1})
_add("¥ yen yuan RMB", {"yen": 1})
_add("₹ rupee rupees Rs Rs.", {"rupee": 1})
_add("N newton newtons", {"mass": 1, "length": 1, "time": -2})
_add("kN kilonewton kilonewtons", {"mass": 1, "length": 1, "time": -2}, 1000)
_ENERGY = {"mass": 1, "length": 2, "time": -2}
_add("J joule joules", _ENERGY)
_add("kJ kilojoule kilojoules", _ENERGY, 1000)
_add("MJ megajoule megajoules", _ENERGY, 10**6)
_add("mJ millijoule millijoules", _ENERGY, "1/1000")
_add("cal calorie calories", _ENERGY, "523/125")
_add("kcal kilocalorie kilocalories", _ENERGY, 4184)
_add("eV", _ENERGY, Fraction(1602176634, 10**28))
_POWER = {"mass": 1, "length": 2, "time": -3}
_add("W watt watts", _POWER)
_add("kW kilowatt kilowatts", _POWER, 1000)
_add("MW megawatt megawatts", _POWER, 10**6)
_add("mW milliwatt milliwatts", _POWER, "1/1000")
_PRESSURE = {"mass": 1, "length": -1, "time": -2}
_add("Pa pascal pascals", _PRESSURE)
_add("kPa kilopascal kilopascals", _PRESSURE, 1000)
_add("MPa", _PRESSURE, 10**6)
_add("atm", _PRESSURE, 101325)
_add("A amp amps ampere amperes", {"current": 1})
_add("mA milliamp milliamps", {"current": 1}, "1/1000")
_add("C coulomb coulombs", {"current": 1, "time": 1})
_add("mC", {"current": 1, "time": 1}, "1/1000")
_add("μC", {"current": 1, "time": 1}, "1/1000000")
_VOLT = {"mass": 1, "length": 2, "time": -3, "current": -1}
_add("V volt volts", _VOLT)
_add("mV millivolt millivolts", _VOLT, "1/1000")
_add("kV kilovolt kilovolts", _VOLT, 1000)
_OHM = {"mass": 1, "length": 2, "time": -3, "current": -2}
_add("Ω ohm ohms", _OHM)
_add("kΩ kilohm kiloohm", _OHM, 1000)
_add("T tesla teslas", {"mass": 1, "time": -2, "current": -1})
_add("Hz hertz", {"time": -1})
_add("kHz", {"time": -1}, 1000)
_add("MHz", {"time": -1}, 10**6)
_add("mol mole moles", {"mole": 1})
_add("mmol", {"mole": 1}, "1/1000")
_add("M", {"mole": 1, "length": -3}, 1000)
_add("Nm", _ENERGY)
_add("Wh", _ENERGY, 3600)
_add("kWh", _ENERGY, 3600000)
_add("F farad farads", {"mass": -1, "length": -2, "time": 4, "current": 2})
_add("μF", {"mass": -1, "length": -2, "time": 4, "current": 2}, "1/1000000")
_add("dB", {"decibel": 1})
MAX_UNIT_CHARS = 80  # of a unit behind an expression
# Short names that no other prefix makes another unit in capitals; the case of the rest counts (`mg` is not `Mg`).
_ANY_CASE_TEXT = """
    km cm cms kg in ft yd mi lb lbs oz gal hr hrs sec min day wk yr yrs deg ton usd atm mol cc
"""
_ANY_CASE = set(_ANY_CASE_TEXT.split())
_SPEEDS = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h", "kmh": "km/h", "mps": "m/s", "rpm": "", "fps": "ft/s"}
_NO_UNIT = {"unit", "units", "square units", "cubic units", "sq units", "sq. units", "u", "su"}
_PER = re.compile(r"\bper\b|\ban?(?= (?:hour|minute|second|day|week|year|month)\b)|\\div|÷")
_GLUED = re.compile(r"([a-zA-Z]{2,5})(?=\s*\^\s*\{?\s*-)")  # `ms^{-2}`: metres per second squared
_FACTOR = re.compile(r"(°\s?[CF]?|[a-zA-ZμΩ$€£¥₹¢]+\.?)\s*(?:\^\s*\{?\s*\(?([+-]?\d)\)?\s*\}?|([23](?!\d)))?")
_MISSING = Unit()
# Words beside a number that would change what it says: numbers, operations, negation, doubt, verbs.
_BLOCKED_WORDS_TEXT = """
    dozen dozens score gross lakh lakhs crore crores bn mn mln k half halves third thirds quarter quarters fourth
    fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundreds hundredth
    hundredths thousands thousandth thousandths millions millionth millionths billions billionth billionths squared
    cubed doubled tripled halved twice thrice divided multiplied mod modulo power powers root inverse reciprocal
    factorial raised increased decreased reduced added subtracted minus plus over pi e log ln sin cos tan sqrt bc
    bce or and not no none never nothing wrong wrongly incorrect false true lie lies lied to less more fewer than
    versus vs under below above before after without excluding except unless if when where whether either neither
    nor both but however maybe perhaps possibly probably likely unlikely unknown unsure sure doubt guess sorry then
    else otherwise rather instead actually opposite almost nearly about approximately approx off other another
    previous is are was were be been am isn aren equals means meant mean has have had would should could can cannot
    will may might must do does did don i we you they he she it
"""
BLOCKED_WORDS = NUMBER_WORDS | set(_BLOCKED_WORDS_TEXT.split())
# These are labels as such (`2 double bonds`, `3 negative roots`), but say something else where nothing follows.
_BLOCKED_AT_END = {"negative", "double", "triple", "square", "cube", "short", "point"}
_LABEL_FILLERS = {"the", "a", "an", "of", "in", "total", "on", "per", "for", "each", "at", "from", "with"}
MAX_LABEL_WORDS = 3


@lru_cache(maxsize=4096)
def parse_unit(text: str) -> Unit | None:
    """The unit or label that is the whole of `text` ("" is no unit), or None when it is neither."""
    text = plain(text).replace("Ω", "Ω").replace(r"\Omega", "Ω").strip().strip("()").strip()
    text = re.sub(r"\\mu\s*", "μ", re.sub(r"\\(?:cdot|times)(?![a-zA-Z])", " ", text))
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{((?:[^{}]|\{\d\})*)\}", r"\1/\2", text)
    if (
        not text
        or text.lower().rstrip(".") in _NO_UNIT
        or re.fullmatch(r"(?:square |cubic )?units?\s*\^?\s*\{?[23]?\}?", text.lower())
    ):
        return _MISSING
    if text in ("%", "percent", "per cent", "pct", "percentage"):
        return Unit(scale=Fraction(1, 100), percent=True)
    return _known_unit(text) or _label(text)


def _known_unit(text: str) -> Unit | None:
    text = _SPEEDS.get(text.lower(), text)
    text = re.sub(
        r"\b(?:degrees?|deg)\s+(celsius|fahrenheit|c|f)\b", lambda m: "°" + m.group(1)[0].upper(), text, flags=re.I
    )
    text = _GLUED.sub(_unglue, _powers_in_words(text))
    dimension: dict[str, int] = {}
    scale = Fraction(1)
    sign, position = 1, 0
    text = _PER.sub("/", text)
    while position < len(text):
        if text[position] in " *·-.()":
            position += 1
            continue
        if text[position] == "/":
            sign = -1
            position += 1
            continue
        match = _FACTOR.match(text, position)
        if not match:
            return None
        entry = _lookup(match.group(1))
        if entry is None:
            return None
        power = sign * int(match.group(2) or match.group(3) or 1)
        for name, exponent in entry[0].items():
            dimension[name] = dimension.get(name, 0) + exponent * power
        scale *= entry[1] ** power
        position = match.end()
    return Unit(tuple(sorted((n, e) for n, e in dimension.items() if e)), scale) if dimension else None


def _unglue(match: re.Match[str]) -> str:
    """Two units written as one before a negative power, where the first letters and the last are both a unit."""
    name = match.group(1)
    if name == "ms" or _lookup(name) is None:
        for cut in range(len(name) - 1, 0, -1):
            if name[:cut] in _TABLE and name[cut:] in _TABLE:
                return f"{name[:cut]} {name[cut:]}"
    return name


def _lookup(name: str) -> tuple[dict[str, int], Fraction] | None:
    name = name.replace(" ", "")
    for candidate in (name, name.rstrip(".")):
        if candidate in _TABLE:
            return _TABLE[candidate]
    lowered = name.lower().rstrip(".")
    return _TABLE.get(lowered) if len(lowered) >= 4 or lowered in _ANY_CASE else None


def _powers_in_words(text: str) -> str:
    """`square cm`, `sq. m`, `cubic feet`, `cm squared` with a written exponent."""
    for after, before, power in (("squared", r"(?:squared?|sq\b\.?)", "2"), ("cubed", r"(?:cubic|cu\b\.?)", "3")):
        text = re.sub(rf"([a-zA-Z]+)\s+{after}\b", rf"\1^{power}", text, flags=re.I)
        text = re.sub(rf"(?<![a-zA-Z]){before}\s*([a-zA-Z]+)", rf"\1^{power}", text, flags=re.I)
    return text


def _label(text: str) -> Unit | None:
    """A few plain nouns (`red cars`, `students per class`); None where any word could change the number before it."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z' -]{1,60}\.?", text):
        return None
    words = re.findall(r"[a-z']+", text.lower())
    kept = [_singular(word) for word in words if word not in _LABEL_FILLERS]
    if len(kept) > MAX_LABEL_WORDS or any(word in BLOCKED_WORDS or "n't" in word for word in words):
        return None
    if any(len(word) == 1 for word in kept) or words[-1] in _BLOCKED_AT_END:
        return None
    if "times" in words[:-1]:  # `5 times` is a count, `5 times as much as that` a product
        return None
    return Unit(label=" ".join(kept)) if kept else _MISSING


_IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "mice": "mouse"}


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def contradiction(left: Unit, right: Unit) -> str:
    """Why two units cannot stand for the same ("" where they can): what is missing on one side contradicts nothing.

    Labels agree when one says no more than the other (`cars`, `red cars`); a label never agrees with a unit.
    """
    if left.known and right.known and (left.dimension, left.percent) != (right.dimension, right.percent):
        return "unit_dimension"
    if (left.known and right.label) or (left.label and right.known):
        return "unit_differs"
    a, b = set(left.label.split()), set(right.label.split())
    return "" if a <= b or b <= a else "label_differs"


def split_unit(text: str) -> tuple[str, Unit]:
    """(expression, unit) of a cleaned text such as `9\\pi \\text{cm}^{2}`; an expression without unit comes back whole.

    A unit is what stands in `\\text{}` at the end, or a known unit of several letters there. One letter alone is a unit
    only behind a space and where no other letter makes it a variable.
    """
    marked = re.search(
        r"\\text\{([^{}]*)\}((?:\s*\^\s*\{?\s*-?\d\s*\}?)?(?:\s*/\s*\\text\{[^{}]*\}(?:\^\{?-?\d\}?)?)*)\s*$", text
    )
    if marked and marked.start() > 0:
        unit = parse_unit(marked.group(1) + plain(marked.group(2)))
        if unit is not None:
            return text[: marked.start()].strip(), unit
    bare = plain(text)
    if bare.endswith("%"):
        return bare[:-1].strip(), Unit(scale=Fraction(1, 100), percent=True)
    for run in re.finditer(r"(?<![\\a-zA-Z])(?:[a-zA-ZμΩ]+|°)", bare):
        if len(bare) - run.start() > MAX_UNIT_CHARS:
            continue
        suffix, before = bare[run.start() :], bare[: run.start()]
        if not before.strip():
            continue
        unit = _known_unit(suffix) or (_MISSING if parse_unit(suffix) == _MISSING and len(suffix) > 3 else None)
        if unit is None or unit.label:
            continue
        if len(run.group()) == 1 and run.group() != "°":
            spaced = before.endswith(" ")
            variables = re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", before)
            if not spaced or variables or before.rstrip().endswith(("+", "-", "*", "/", "^", "=", "cdot")):
                continue
        if before.rstrip().endswith(("+", "-", "*", "^", "=", "(", "{", "_")):
            continue
        if run.group() == "°" and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", before):
            continue
        return before.strip(), unit
    return text, _MISSING
