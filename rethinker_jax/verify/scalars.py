"""One value against one value: a number, a quantity, a closed form, an expression, with or without a name."""

import itertools
import re
from fractions import Fraction

from rethinker_jax.verify import symbolic
from rethinker_jax.verify.guards import MAX_CHARS, refusal
from rethinker_jax.verify.normalize import key, split_name
from rethinker_jax.verify.numbers import Number, same_number
from rethinker_jax.verify.quantities import Quantity, parse_quantity, same_quantity
from rethinker_jax.verify.units import contradiction, split_unit

Result = tuple[bool, str]
RELATION = re.compile(r"=|<|>|\\(?:le|ge|leq|geq|lt|gt|ne|neq)(?![a-zA-Z])")
_LIST = re.compile(
    r"[,;]|\\pm|\\text\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\cup(?![a-zA-Z])|\\(?:lor|vee)(?![a-zA-Z])"
)


def compare_scalar(gold: str, answer: str) -> Result:
    """One value: a number, a quantity, an expression, with or without the name it is given."""
    if max(len(gold), len(answer)) > MAX_CHARS:
        return False, "guard_length"
    gold_name, gold_value = split_name(gold)
    name, value = split_name(answer)
    if _names_differ(gold_name, name):
        rearranged = bool(RELATION.search(answer)) and symbolic.same_expression(gold, answer)[0]  # F = ma, a = F/m
        return rearranged, "rearranged" if rearranged else "name_differs"
    if RELATION.search(value):
        chained = _end_of_chain(value, named=bool(name))
        if chained is None:
            return symbolic.same_expression(gold, answer) if RELATION.search(gold) else (False, "relation_for_value")
        value = chained
    wanted = parse_quantity(gold_value)
    if wanted is not None:
        given = parse_quantity(value, lenient_unit=wanted.unit.known)
        if given is None and value.startswith("{"):
            given = None
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
        if abs(value - wanted.number.value) <= abs(wanted.number.value) * Fraction(1, 10**12):
            return True, "closed_form"
        rule = same_number(wanted.number, Number(value)) if wanted.number.decimals is not None else None
        return (True, "closed_form_rounded") if rule else (False, "value")
    given = parse_quantity(expression)
    if given is not None and given.number.decimals is not None:
        value = symbolic.number_value(gold)
        if value is not None:
            return (True, "rounded") if same_number(Number(value), given.number) else (False, "value")
    return symbolic.same_expression(gold, expression)


def _names_differ(gold: str, answer: str) -> bool:
    """Two variables, functions or segments that are not the same; words never contradict (`Volume = 5`, `V = 5`)."""
    pattern = r"\\?[a-z]|\\[a-z]+|[a-z]\([a-z]\)|[A-Z]{2}|\\angle[A-Z]+|[a-z]_\{?\w\}?"
    left, right = re.sub(r"\s+", "", gold), re.sub(r"\s+", "", answer)
    if {left[1:], right} == {"(x)", "y"} or {left, right[1:]} == {"(x)", "y"}:  # y = ... for f(x) = ...
        return False
    if not re.fullmatch(pattern, left) or not re.fullmatch(pattern, right):
        return False
    return left != right and sorted(left) != sorted(right)


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
