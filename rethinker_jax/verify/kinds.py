"""Which kind an answer is of, read off the gold, and the comparison that goes with each kind."""

import re
from collections.abc import Callable

from rethinker_jax.verify import boxes, structures, symbolic, texts
from rethinker_jax.verify.guards import MAX_CHARS, MAX_STRUCTURE_NESTING, refusal
from rethinker_jax.verify.normalize import clean, key, plain, split_name
from rethinker_jax.verify.numbers import parse_integer
from rethinker_jax.verify.quantities import Quantity, parse_quantity
from rethinker_jax.verify.scalars import RELATION, TOPICS, Result, compare_scalar, same_product, split_answer
from rethinker_jax.verify.units import split_unit

KINDS = (
    "mcq", "number", "units", "percent", "fraction", "expression", "equation", "interval", "set", "tuple", "matrix",
    "yesno", "text", "count", "chem", "datetime", "ratio", "bearing", "bbox",
)  # fmt: skip

_STRUCTURES = {"set", "tuple", "matrix", "interval"}


def kind_of(gold: str) -> str:
    """The kind of a cleaned gold without options."""
    if parse_integer(gold) is not None:
        return "number"
    if len(gold) > MAX_CHARS:
        return _kind_of_long(gold)
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
    if re.fullmatch(r"[A-Za-z]=[A-Za-z]{2,4}", key(gold)):
        return "equation"  # V = IR
    if symbolic.has_words(expression) or re.fullmatch(r"[A-Za-z]{2,}", key(expression)):
        return "text"
    if not re.search(r"[\da-zA-Z]", expression):
        return "text"
    return "equation" if not name and RELATION.search(gold) else "expression"


def _kind_of_long(gold: str) -> str:
    """The kind of what is too long for one value."""
    value = split_name(gold)[1]
    if structures.parse_matrix(value):
        return "matrix"
    return _structure_kind(gold, value) or ("text" if symbolic.has_words(value) else "expression")


def refuse_gold(kind: str, gold: str) -> str:
    """The guard that a cleaned gold of a kind breaks ("" for none), so that nothing could be compared with it."""
    if kind in _STRUCTURES:
        return "nesting" if structures.nesting(gold) > MAX_STRUCTURE_NESTING else ""
    if len(gold) > MAX_CHARS:
        return "length"
    return (refusal(gold) or "") if kind in ("expression", "equation") else ""


def _number_kind(value: str, quantity: Quantity) -> str:
    if quantity.unit.percent:
        return "percent"
    if quantity.unit.known:
        return "units"
    return "fraction" if r"\frac" in value or "/" in value else "number"


def _structure_kind(gold: str, value: str) -> str:
    if structures.parse_domain_range(gold) or structures.is_real_line(gold):
        return "interval"
    if re.search(r"\\(?:cup|infty|in|mathbb|le|ge|ne)(?![a-zA-Z])|[<>]", gold) and structures.parse_intervals(gold):
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
    if texts.is_empty_set(gold):
        return texts.is_empty_set(answer), "empty_set"
    if kind in _STRUCTURES:
        if structures.nesting(gold) > MAX_STRUCTURE_NESTING:
            return False, "guard_gold"
    elif max(len(gold), len(answer)) > MAX_CHARS:
        return False, "guard_length"
    try:
        return _COMPARISONS.get(kind, compare_scalar)(gold, answer)
    except RecursionError:  # one of them nests deeper than parsers and sympy can follow, in signs that no guard counts
        return False, "guard_recursion"


def compare_equation(gold: str, answer: str) -> Result:
    if not RELATION.search(answer):
        product = re.fullmatch(r"[A-Za-z]=[A-Za-z]{2,4}", key(gold)) and same_product(key(gold), key(answer))
        return (True, "product") if product else (False, "value_for_equation")
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
    pair = structures.parse_domain_range(gold)
    if pair:
        given_pair = structures.parse_domain_range(answer) or tuple(structures.split_list(answer))
        return len(given_pair) == 2 and all(map(_same_values_of, pair, given_pair)), "domain_range"
    wanted, given = structures.parse_intervals(gold), structures.parse_intervals(answer)
    if wanted and given:
        names = structures.variable_of(gold), structures.variable_of(answer)
        if all(names) and names[0] != names[1]:
            return False, "name_differs"
        return structures.same_intervals(wanted, given, same), "intervals"
    if symbolic.has_words(answer):
        return False, "no_interval"
    return symbolic.same_expression(gold, answer)


def _same_values_of(gold: str, answer: str) -> bool:
    """Two sets of values, whatever the variable is called."""
    wanted, given = structures.parse_intervals(gold), structures.parse_intervals(answer)
    return structures.same_intervals(wanted, given, same) if wanted and given else same(gold, answer)


_TEXT_AROUND = re.compile(r"^\\text\s*\{([^{}]*,[^{}]*)\}$")  # a list of words in one \text{}


def compare_structure(gold: str, answer: str) -> Result:
    """Sets, lists and tuples; a two-part `( )` may also be the interval that the answer writes as an inequality."""
    if split_name(answer)[0] != split_answer(answer, split_name(gold)[0])[0]:
        return False, "no_name"
    wanted, given = _parts(gold), _parts(_TEXT_AROUND.sub(r"\1", answer))
    if wanted is None:
        return compare_scalar(gold, answer)
    if given is None:
        if wanted.shape in ("tuple", "bracket") and structures.parse_intervals(gold) and RELATION.search(answer):
            return compare_interval(gold, answer)
        if len(wanted.items) == 1:
            return compare_scalar(wanted.items[0], answer)
        if wanted.shape == "tuple" and (rows := structures.parse_matrix(answer)) and 1 in (len(rows), len(rows[0])):
            cells = structures.Parts("tuple", tuple(cell for row in rows for cell in row))
            return structures.same_parts(wanted, cells, same), "vector"
        return False, "value_for_structure"
    return structures.same_parts(wanted, given, same), wanted.shape


# What may stand before a structure: `x \\in`, a point's name, `(x, y) =`, words that only announce it.
_STRUCTURE_LEAD = re.compile(
    r"^(?:\\?[a-zA-Z]\s*\\in(?![a-zA-Z])\s*|[A-Z]'?\s*(?=\([^()]*,[^()]*\)$)|\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)\s*=\s*"
    r"|(?i:(?:the|point|points|answer|solution|solutions|set|vertex|vertices|center|centre|coordinates|intersection|final|of|is|are"
    r"|at|be)\s+)+:?\s*(?=[(\[\\]))"
)


def _parts(text: str) -> structures.Parts | None:
    """The structure of a text or of the value that it names (`S = \\{1, 2\\}`, `x \\in \\{1, 2\\}`, `P(1, 2)`)."""
    text = _STRUCTURE_LEAD.sub("", text)
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
    gold_name, gold_value = split_name(gold)
    wanted, given = structures.parse_matrix(gold_value), structures.parse_matrix(split_answer(answer, gold_name)[1])
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
    if texts.is_symbol(plain(gold)) and key(answer) != key(gold):
        return False, "symbol"
    if same_product(key(gold), key(answer)):
        return True, "product"
    name, value = split_answer(answer, split_name(gold)[0], TOPICS)
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
    gold_name, gold_value = split_name(gold)
    wanted, given = texts.parse_ratio(gold_value), texts.parse_ratio(split_answer(answer, gold_name)[1])
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
        compare_equation(gold, answer) if RELATION.search(gold) else compare_scalar(gold, answer)
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
