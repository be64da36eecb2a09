"""One value against one value: a number, a quantity, a closed form, an expression, with or without a name."""

import itertools
import re
from fractions import Fraction

from rethinker_jax.verify import symbolic
from rethinker_jax.verify.formulas import Unread
from rethinker_jax.verify.guards import MAX_CHARS, refusal
from rethinker_jax.verify.normalize import key, split_name
from rethinker_jax.verify.numbers import Number, same_number
from rethinker_jax.verify.quantities import Quantity, parse_quantity, same_quantity
from rethinker_jax.verify.units import BLOCKED_WORDS, contradiction, split_unit
from rethinker_jax.verify.values import value_at

Result = tuple[bool, str]
RELATION = re.compile(r"=|<|>|\\(?:le|ge|leq|geq|lt|gt|ne|neq)(?![a-zA-Z])")
_LIST = re.compile(
    r"[,;]|\\pm|\\text\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\cup(?![a-zA-Z])|\\(?:lor|vee)(?![a-zA-Z])"
)
_FEET_AND_INCHES = re.compile(r"^(\d+)\s*'\s*(\d+(?:\.\d+)?)\s*(?:\"|'')$")
_EXACTLY = re.compile(r"^exactly\s+", re.IGNORECASE)
# What may be named before an answer (singular); other words may say anything.
_QUANTITIES_TEXT = """
    area volume length width height depth thickness radius diameter circumference perimeter angle slope gradient
    hypotenuse base altitude apothem distance displacement speed velocity acceleration force mass weight density
    pressure temperature time energy work heat charge current voltage potential resistance capacitance inductance
    frequency period wavelength amplitude momentum torque impulse cost price profit loss revenue interest principal
    discount tax rate fee salary sum difference product quotient ratio mean median mode range average variance
    deviation probability chance percentage percent count amount age year term degree order rank determinant
    coefficient intercept maximum minimum max min measure surface lateral slant arc sector chord tangent diagonal
    side midpoint vertex vertices center centre focus foci domain coordinate point set root zero intersection
    asymptote interval axis equation function eigenvalue vector matrix scale factor expression formula remainder
    limit derivative integral unit vector concentration molarity moles efficiency power intensity kinetic mechanical
    net standard sin cos tan simple compound common curved arithmetic geometric expected annual monthly original
    first last
"""
QUANTITIES = frozenset(_QUANTITIES_TEXT.split())
# What may be named before a word.
_TOPICS_TEXT = """
    name color colour shape city country capital state animal type kind year month day date time title
"""
TOPICS = frozenset(_TOPICS_TEXT.split())
_ANNOUNCING_TEXT = """
    the a an of is its it my our so thus hence therefore final correct answer result solution value total number
    required overall exact approximate numerical in for as
"""
_ANNOUNCING = frozenset(_ANNOUNCING_TEXT.split())
_DENYING = (BLOCKED_WORDS - {"is", "it", "mean", "power", "root", "zero", "sin", "cos", "tan"}) | {
    "opposite",
    "double",
    "triple",
    "second",
}
_LETTERS = re.compile(r"[A-Za-z](?:_?\{?\w\}?)?'?|[A-Z]{2,3}|[a-zA-Z]{1,3}\([a-zA-Z\d]\)|[a-zA-Z]_\{?\w+\}?")
_MARKED = re.compile(r"\\(?:overline|widehat|overrightarrow|vec|bar|hat)\s*\{?\s*([A-Z]{1,2})\s*\}?")
_SYMBOL_NAME = re.compile(r"\\?[a-zA-Z]|\\[a-z]+|[a-z]\([a-z]\)|[A-Z]{2}|\\angle[A-Z]+|[a-zA-Z]_\{?\w\}?")
_USUAL_LETTERS = {
    "current": "I", "charge": "Q", "heat": "Q", "momentum": "P", "inductance": "L", "inertia": "I", "impulse": "J",
    "kinetic": "T", "potential": "UV", "displacement": "SX", "distance": "S", "weight": "FG", "speed": "VU",
    "hypotenuse": "C", "probability": "P", "average": "M", "work": "A", "voltage": "UE", "force": "N",
}  # fmt: skip
_SYNONYMS = {"gradient": "slope", "velocity": "speed"}


def compare_scalar(gold: str, answer: str) -> Result:
    """One value: a number, a quantity, an expression, with or without the name it is given."""
    if max(len(gold), len(answer)) > MAX_CHARS:
        return False, "guard_length"
    gold_name, gold_value = split_name(gold)
    name, value = split_answer(answer, gold_name)
    if _names_differ(gold_name, name):
        rearranged = bool(RELATION.search(answer)) and symbolic.same_expression(gold, answer)[0]  # F = ma, a = F/m
        return rearranged, "rearranged" if rearranged else "name_differs"
    if RELATION.search(value):
        chained = _end_of_chain(value, named=bool(name))
        if chained is None:
            return symbolic.same_expression(gold, answer) if RELATION.search(gold) else (False, "relation_for_value")
        value = chained
    value = _EXACTLY.sub("", value)
    wanted = parse_quantity(gold_value)
    if wanted is not None:
        value = _FEET_AND_INCHES.sub(r"\1 ft \2 in", value) if wanted.unit.dimension == (("length", 1),) else value
        given = parse_quantity(value, lenient_unit=wanted.unit.known)
        if given is not None:
            return same_quantity(wanted, given)
    singleton = re.fullmatch(r"\\\{(?!\s*\\emptyset)(.*)\\\}|\[(.*)\]", value)
    if singleton:
        value = singleton.group(1) or singleton.group(2) or ""
    if _LIST.search(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", value)) and not _LIST.search(gold_value):
        return False, "list_for_value"
    if key(gold_value) == key(value):
        return True, "same_text"
    return _closed_form(gold_value, value, wanted)


def _closed_form(gold: str, answer: str, wanted: Quantity | None) -> Result:
    """What needs algebra: the units are set aside and must agree, then the expressions are compared."""
    expression, unit = split_unit(answer)
    if wanted is not None:
        gold_unit = wanted.unit
    else:
        whole = gold
        gold, gold_unit = split_unit(gold)
        if (gold, expression) != (whole, answer):  # `\\pi hr^2`: what looks like a unit may be variables
            same, rule = symbolic.same_expression(whole, answer)
            if same:
                return True, rule
    if why := contradiction(gold_unit, unit):
        return False, why
    if gold_unit.known and unit.known and gold_unit.scale != unit.scale:
        return False, "unit_differs"
    if key(gold) == key(expression):
        return True, "same_text"
    if wanted is not None:
        value = symbolic.number_value(expression)
        if value is None:
            guard = refusal(expression)
            return False, f"guard_{guard}" if guard else "no_number"
        if _has_value(expression, value, wanted.number.value):
            return True, "closed_form"
        rule = same_number(wanted.number, Number(value)) if wanted.number.decimals is not None else None
        return (True, "closed_form_rounded") if rule else (False, "value")
    given = parse_quantity(expression)
    if given is not None and given.number.decimals is not None:
        value = symbolic.number_value(gold)
        if value is not None:
            return (True, "rounded") if same_number(Number(value), given.number) else (False, "value")
    return symbolic.same_expression(gold, expression)


def _has_value(expression: str, value: Fraction, wanted: Fraction) -> bool:
    """Is `value`, that of the closed form, the wanted one: exactly where the form is rational, else to 30 digits."""
    try:
        rational = isinstance(value_at(expression, (), 0, True, False), Fraction)
    except Unread:  # sympy read it
        rational = False
    return value == wanted if rational else abs(value - wanted) <= abs(wanted) * Fraction(1, 10**30)


def split_answer(answer: str, gold_name: str = "", words: frozenset[str] = QUANTITIES) -> tuple[str, str]:
    """`split_name` for an answer: words count as a name only where each is known, so that `wrong: 5` stays whole.

    Known are the gold's own name, `words`, words that only announce (`the final answer`), letters and segments; after
    `of` any word that could not change the value (`number of apples`).
    """
    name, value = split_name(answer)
    head, own = re.sub(r"\s+\(", "(", name).partition(" of ")[0], set(gold_name.lower().split())
    if any(len(token) > 1 and token.lower() in _DENYING for token in name.split()):
        return "", answer
    for token in head.split() if "\\" not in name else ():
        word = token.lower()
        known = own | _ANNOUNCING | words
        if not (word in known or word.removesuffix("s") in known or _LETTERS.fullmatch(token)):
            return "", answer
    return name, value


def _names_differ(gold: str, answer: str) -> bool:
    """Two variables, segments or quantities that are not the same; a word and its letter are (`Volume`, `V`)."""
    left, right = (re.sub(r"\s+|^m(?=\s*\\angle)", "", _MARKED.sub(r"\1", name)) for name in (gold, answer))
    if {left[1:], right} == {"(x)", "y"} or {left, right[1:]} == {"(x)", "y"}:  # y = ... for f(x) = ...
        return False
    symbols = [bool(_SYMBOL_NAME.fullmatch(name)) for name in (left, right)]
    if all(symbols):
        return left != right and sorted(left) != sorted(right)
    if "\\" in left + right:
        return False
    if any(symbols):
        symbol, words = (left, _name_words(answer)) if symbols[0] else (right, _name_words(gold))
        if len(symbol) == 2:  # a segment, unless the words name another one
            return any(re.fullmatch("[A-Z]{2}", word) and sorted(word) != sorted(symbol) for word in words)
        usual = "XYZN" + "".join(word[0].upper() + _USUAL_LETTERS.get(word, "") for word in words)
        return bool(words) and symbol.isupper() and symbol not in usual
    a, b = set(_name_words(gold)), set(_name_words(answer))
    return not (a <= b or b <= a)


def _name_words(name: str) -> list[str]:
    """The words of a name that say what is named, lower case but for its points (`Angle A`)."""
    found = [word if re.fullmatch("[A-Z]{1,3}", word) else word.lower() for word in re.findall("[A-Za-z]+", name)]
    words = [_SYNONYMS.get(word, word) for word in found]
    return [word for word in words if word not in _ANNOUNCING]


def _end_of_chain(text: str, named: bool) -> str | None:
    """The last part of `2 + 3 = 5` where the parts before it have its value and are not its text; None otherwise."""
    if re.search(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])", text):
        return None
    parts = [part.strip() for part in re.split(r"=|\\approx(?![a-zA-Z])", text)]
    if not 2 <= len(parts) <= 4 or not all(parts):
        return None
    found = [symbolic.number_value(split_unit(part)[0]) for part in parts]
    values = [value for value in found if value is not None]
    if len(values) != len(parts) or len({key(part) for part in parts}) != len(parts):
        return None
    last = values[-1]
    return parts[-1] if all(abs(v - last) <= abs(last) * Fraction(1, 200) for v in values) else None


def same_product(gold: str, answer: str) -> bool:
    """Letters in a row as a product: `a t` and `a \\cdot t` are `at`, `ba` is `ab`; but `on` is not `no`.

    They commute where they follow in the alphabet (`ab`, `xyz`), have no vowel, or are the value of a name.
    """
    match = re.fullmatch(r"([a-zA-Z]=)([a-zA-Z]{2,4})|[a-z]{2,3}", gold)
    if match is None:
        return False
    product, name = match.group(2) or gold, match.group(1) or ""
    letters = re.sub(r"\\cdot|\\times|[*␣]", "", answer.removeprefix(name))
    if letters == product:
        return True
    ordered = "".join(sorted(product))
    follows = all(ord(b) == ord(a) + 1 for a, b in itertools.pairwise(ordered))
    commutes = name or follows or not (re.search("[aeiouy]", product) or split_unit("1 " + product)[1].known)
    return bool(commutes) and sorted(letters) == sorted(product)
