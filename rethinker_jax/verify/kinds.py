"""Which kind an answer is of, read off the gold, and the comparison that goes with each kind."""

import re
from collections.abc import Callable
from fractions import Fraction

from rethinker_jax.verify import boxes, structures, symbolic, texts
from rethinker_jax.verify.guards import MAX_CHARS, refusal
from rethinker_jax.verify.normalize import clean, key, plain, split_name
from rethinker_jax.verify.numbers import Number, parse_integer, same_number
from rethinker_jax.verify.quantities import Quantity, parse_quantity, same_quantity
from rethinker_jax.verify.units import split_unit

KINDS = (
    "mcq", "number", "units", "percent", "fraction", "expression", "equation", "interval", "set", "tuple", "matrix",
    "yesno", "text", "count", "chem", "datetime", "ratio", "bearing", "bbox",
)  # fmt: skip

_SCALARS = {
    "number",
    "units",
    "percent",
    "fraction",
    "expression",
    "equation",
    "count",
    "ratio",
    "bearing",
    "datetime",
    "yesno",
}

Result = tuple[bool, str]
_RELATION = re.compile(r"=|<|>|\\(?:le|ge|leq|geq|lt|gt|ne|neq)(?![a-zA-Z])")
_LIST = re.compile(
    r"[,;]|\\pm|\\text\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\cup(?![a-zA-Z])|\\(?:lor|vee)(?![a-zA-Z])"
)


def kind_of(gold: str) -> str:
    """The kind of a cleaned gold without options."""
    if parse_integer(gold) is not None:
        return "number"
    if re.fullmatch(r"\(?[A-K]\)?", gold):
        return "mcq"
    if texts.is_yes_no(gold):
        return "yesno"
    name, value = split_name(gold)
    if texts.parse_base(gold) or texts.geometric_name(gold):
        return "text"
    if texts.parse_bearing(gold) is not None:
        return "bearing"
    if texts.parse_date(gold) or texts.parse_time(gold, bare=bool(re.match(r"\d{1,2}:\d\d(?!\d)", plain(gold)))):
        return "datetime"
    quantity = parse_quantity(value)
    if quantity is not None:
        return _number_kind(value, quantity)
    if texts.parse_ratio(gold):
        return "ratio"
    if structures.parse_matrix(value):
        return "matrix"
    structure = _structure_kind(gold, value)
    if structure:
        return structure
    if texts.is_chemistry(gold):
        return "chem"
    expression, _ = split_unit(value)
    if symbolic.has_words(expression) or re.fullmatch(r"[A-Za-z]{2,}", key(expression)):
        return "text"
    if not re.search(r"[\da-zA-Z]", expression):
        return "text"
    return "equation" if not name and _RELATION.search(gold) else "expression"


def _number_kind(value: str, quantity: Quantity) -> str:
    if quantity.unit.percent:
        return "percent"
    if quantity.unit.known:
        return "units"
    return "fraction" if r"\frac" in value or "/" in value else "number"


def _structure_kind(gold: str, value: str) -> str:
    if re.search(
        r"\\(?:cup|infty|in|mathbb)(?![a-zA-Z])|[<>]|\\(?:le|ge|leq|geq)(?![a-zA-Z])", gold
    ) and structures.parse_intervals(gold):
        return "interval"
    parts = structures.parse_parts(gold) or _parts(gold)
    if parts is None:
        return ""
    if parts.shape == "list" and any(len(plain(item).split()) > 3 and symbolic.has_words(item) for item in parts.items):
        return "text"
    return {"set": "set", "list": "set", "tuple": "tuple", "bracket": "tuple", "half": "interval"}[parts.shape]


def same(gold: str, answer: str) -> bool:
    """Any two answers, the kind read off the gold: for the parts of structures and the texts of options."""
    return compare(kind_of(clean(gold)), clean(gold), clean(answer))[0]


def compare(kind: str, gold: str, answer: str) -> Result:
    """Whether a cleaned answer is the cleaned gold of a kind (not `mcq`), and the rule that decided."""
    if kind == "number":
        left, right = parse_integer(gold), parse_integer(answer)
        if left is not None and right is not None:
            return (left == right), "integer"
    if kind == "bbox":
        return compare_boxes(gold, answer)
    if key(gold) == key(answer):
        return True, "same_text"
    if kind in _SCALARS and len(answer) > MAX_CHARS:
        return False, "guard_length"
    return _COMPARISONS.get(kind, compare_scalar)(gold, answer)


def compare_scalar(gold: str, answer: str) -> Result:
    """One value: a number, a quantity, an expression, with or without the name it is given."""
    gold_name, gold_value = split_name(gold)
    name, value = split_name(answer)
    if _names_differ(gold_name, name):
        return False, "name_differs"
    if _RELATION.search(value):
        chained = _end_of_chain(value, named=bool(name))
        if chained is None:
            return compare_equation(gold, answer) if _RELATION.search(gold) else (False, "relation_for_value")
        value = chained
    wanted = parse_quantity(gold_value)
    if wanted is not None:
        given = parse_quantity(value, lenient_unit=wanted.unit.known)
        if given is None and value.startswith("{"):
            given = None
        if given is not None:
            return same_quantity(wanted, given)
    singleton = re.fullmatch(r"\\\{(.*)\\\}|\[(.*)\]", value)
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
        gold, gold_unit = split_unit(gold)
    if (
        gold_unit.known
        and unit.known
        and (gold_unit.dimension, gold_unit.scale, gold_unit.percent) != (unit.dimension, unit.scale, unit.percent)
    ):
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


def compare_equation(gold: str, answer: str) -> Result:
    if not _RELATION.search(answer):
        return False, "value_for_equation"
    if structures.parse_intervals(gold):
        return compare_interval(gold, answer)
    gold_parts, parts = structures.split_list(gold), structures.split_list(answer)
    if len(gold_parts) != len(parts):
        return False, "number_of_equations"
    if len(parts) > 1:
        return structures.same_parts(
            structures.Parts("set", tuple(gold_parts)), structures.Parts("set", tuple(parts)), same
        ), "equations"
    return symbolic.same_expression(gold, answer)


def compare_interval(gold: str, answer: str) -> Result:
    wanted, given = structures.parse_intervals(gold), structures.parse_intervals(answer)
    if wanted and given:
        names = structures.variable_of(gold), structures.variable_of(answer)
        if all(names) and names[0] != names[1]:
            return False, "name_differs"
        return structures.same_intervals(wanted, given, same), "intervals"
    if symbolic.has_words(answer):
        return False, "no_interval"
    return symbolic.same_expression(gold, answer)


def compare_structure(gold: str, answer: str) -> Result:
    """Sets, lists and tuples; a two-part `( )` may also be the interval that the answer writes as an inequality."""
    wanted, given = _parts(gold), _parts(answer)
    if wanted is None:
        return compare_scalar(gold, answer)
    if given is None:
        if wanted.shape == "tuple" and structures.parse_intervals(gold) and _RELATION.search(answer):
            return compare_interval(gold, answer)
        if len(wanted.items) == 1:
            return compare_scalar(wanted.items[0], answer)
        return False, "value_for_structure"
    return structures.same_parts(wanted, given, same), wanted.shape


def _parts(text: str) -> structures.Parts | None:
    """The structure of a text or of the value that it names (`S = \\{1, 2\\}`, `x \\in \\{1, 2\\}`, `P(1, 2)`)."""
    text = re.sub(r"^\\?[a-zA-Z]\s*\\in(?![a-zA-Z])\s*", "", text)
    text = re.sub(r"^[A-Z]'?\s*(?=\([^()]*,[^()]*\)$)", "", text)
    value = split_name(text)[1]
    if value != text and value[:1] in ("(", "[", "\\"):
        return structures.parse_parts(value) or structures.parse_parts(text)
    parts = structures.parse_parts(text)
    if parts and parts.shape == "list":
        _, _, rest = parts.items[0].partition("=")
        unnamed = not any("=" in item for item in parts.items[1:])
        if rest and unnamed and split_name(parts.items[0])[0]:  # x = 2, 3
            return structures.Parts("list", (rest.strip(), *parts.items[1:]))
    return parts


def compare_tuple(gold: str, answer: str) -> Result:
    return compare_structure(gold, answer)


def compare_matrix(gold: str, answer: str) -> Result:
    wanted, given = structures.parse_matrix(split_name(gold)[1]), structures.parse_matrix(split_name(answer)[1])
    if wanted is None:
        return compare_structure(gold, answer)
    if given is None:
        parts = _parts(answer)
        flat = [cell for row in wanted for cell in row]
        if parts is None or min(len(wanted), len(wanted[0])) > 1 or parts.shape == "set":
            return False, "no_matrix"
        return structures.same_parts(
            structures.Parts("tuple", tuple(flat)), structures.Parts("list", parts.items), same
        ), "vector"
    return structures.same_matrix(wanted, given, same), "matrix"


def compare_yes_no(gold: str, answer: str) -> Result:
    return texts.polarity(gold) == texts.polarity(answer), "yesno"


def compare_text(gold: str, answer: str) -> Result:
    base = texts.parse_base(gold)
    if base:
        given = texts.parse_base(answer)
        return (given == base if given else key(answer) == base[0]), "base"
    if texts.is_symbol(gold) and key(answer) != key(gold):
        return False, "symbol"
    if re.fullmatch(r"(?:[a-z]=)?[a-z]{2,3}", key(gold)) and key(gold) == key(answer).replace("␣", ""):
        return True, "same_text"  # a product of variables: `at`, `a t`
    name, value = split_name(answer)
    return texts.same_text(gold, answer) or bool(name and texts.same_text(gold, value)), "text"


def compare_chemistry(gold: str, answer: str) -> Result:
    return texts.same_reaction(gold, answer), "chemistry"


def compare_date_time(gold: str, answer: str) -> Result:
    date = texts.parse_date(gold)
    if date:
        given = texts.parse_date(answer)
        if given is None:
            return texts.same_text(gold, answer), "date"
        return date[1:] == given[1:] and (date[0] == given[0] or 0 in (date[0], given[0])), "date"
    clock = texts.same_time(gold, answer)
    return (clock, "time") if clock is not None else compare_text(gold, answer)


def compare_ratio(gold: str, answer: str) -> Result:
    wanted, given = texts.parse_ratio(split_name(gold)[1]), texts.parse_ratio(split_name(answer)[1])
    if wanted is None:
        return compare_scalar(gold, answer)
    if given is not None:
        return wanted == given, "ratio"
    if len(wanted) == 2 and wanted[1]:
        quantity = parse_quantity(answer)
        if (
            quantity is not None
            and not quantity.unit.known
            and ("/" in answer or r"\frac" in answer or quantity.number.decimals is not None)
        ):
            return quantity.number.value == wanted[0] / wanted[1], "ratio"
    return False, "no_ratio"


def compare_bearing(gold: str, answer: str) -> Result:
    wanted, given = texts.parse_bearing(gold), texts.parse_bearing(answer)
    if wanted is None:
        return compare_scalar(gold, answer)
    if given is None:
        quantity = parse_quantity(answer)
        whole = quantity is not None and quantity.number.value == wanted and not quantity.unit.label
        return bool(whole and (re.match(r"\s*\d{3}", answer) or gold[:1].isdigit())), "bearing"
    return wanted == given, "bearing"


def compare_boxes(gold: str, answer: str) -> Result:
    wanted, given = boxes.parse_boxes(gold), boxes.parse_boxes(answer)
    if wanted is None or given is None:
        return False, "no_box"
    return boxes.same_boxes(wanted, given), "iou"


def compare_count(gold: str, answer: str) -> Result:
    """A whole number of things: the noun may be missing, and may say more than the gold's."""
    return compare_scalar(gold, answer)


_COMPARISONS: dict[str, Callable[[str, str], Result]] = {
    "equation": lambda gold, answer: (
        compare_equation(gold, answer) if _RELATION.search(gold) else compare_scalar(gold, answer)
    ),
    "interval": compare_interval,
    "set": compare_structure,
    "tuple": compare_tuple,
    "matrix": compare_matrix,
    "yesno": compare_yes_no,
    "text": compare_text,
    "chem": compare_chemistry,
    "datetime": compare_date_time,
    "ratio": compare_ratio,
    "bearing": compare_bearing,
}
