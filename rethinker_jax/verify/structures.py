r"""Answers with parts: sets, lists, tuples, intervals, inequalities, matrices.

`( )` is ordered, `{ }` and bare comma lists are not. `(1, 2)` may be a point or an open interval and is read as what
the other side is. Parts are compared by the function that the caller hands in.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

from rethinker_jax.verify.guards import MAX_ITEMS, MAX_REWRITTEN
from rethinker_jax.verify.normalize import closes_at_end, key, plain, split_name

MAX_SIGNS = 3  # plus-minus signs of one item: n of them stand for 2^n items
_SIGNS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
Same = Callable[[str, str], bool]
_JOIN = re.compile(
    r"\s*(?:\\text\{\s*(and|or)\s*\}|(?<![a-zA-Z\\])(and|or)(?![a-zA-Z])|\\(?:lor|vee|land|wedge)(?![a-zA-Z]))\s*",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """`shape` is `set`, `tuple`, `list` (bare commas), `bracket` or `half` (half-open); `closed` = (left, right).

    `joints` are the words and signs between the items of a list: `and`, `or`, `land`, `lor`.
    """

    shape: str
    items: tuple[str, ...]
    closed: tuple[bool, bool] = (False, False)
    joints: frozenset[str] = frozenset()


def split_top(text: str, separators: str = ",;") -> list[str]:
    """Splits at separators outside every bracket; a LaTeX `\\{` is a bracket too."""
    items, depth, start = [], 0, 0
    for index, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c in separators and depth <= 0:
            items.append(text[start:index].strip())
            start = index + 1
    items.append(text[start:].strip())
    return items


def nesting(text: str) -> int:
    """How deep brackets that hold separators stand in each other, the whole text as the first where it has any."""
    text = _JOIN.sub(";", text)
    levels = [(False, 0)]  # of each open bracket: does it hold a separator itself, the depth inside
    for c in text + ")" * sum(map(text.count, "([{")):
        if c in "([{":
            levels.append((False, 0))
        elif c in ",;":
            levels[-1] = (True, levels[-1][1])
        elif c in ")]}" and len(levels) > 1:
            separated, depth = levels.pop()
            levels[-1] = (levels[-1][0], max(levels[-1][1], depth + separated))
    separated, depth = levels[0]
    return depth + separated


def split_list(text: str) -> list[str]:
    """The items of a bare list: commas, semicolons, `and`, `or`; `\\pm` gives two."""
    if len(text) > 20_000:
        return [text]
    joined = _JOIN.sub(" ; ", text)
    items = [item for item in split_top(joined, ",;" if not _one_thousands(joined) else ";") if item]
    if any(_SIGNS.search(item) for item in items):
        items = [signed for item in items for signed in _both_signs(item)]
    return items[: MAX_ITEMS + 1]


def _one_thousands(text: str) -> bool:
    return bool(re.fullmatch(r"[^,]*(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)[^,]*", text))


def _both_signs(item: str) -> list[str]:
    if not 1 <= item.count(r"\pm") <= MAX_SIGNS:
        return [item]
    plus = "+" if item.split(r"\pm")[0].strip() else ""
    return [signed for sign in (plus, "-") for signed in _both_signs(item.replace(r"\pm", sign, 1))]


def parse_parts(text: str) -> Parts | None:
    """The structure that is the whole of a cleaned text, or None for a scalar."""
    text = text.strip()
    if text.startswith(r"\{") and text.endswith(r"\}") and r"\{" not in text[2:-2]:
        return Parts("set", tuple(split_list(text[2:-2])))
    if len(text) >= 2 and text[0] in "([" and text[-1] in ")]" and _one_bracket(text):
        items = tuple(split_top(text[1:-1], ",;"))
        if len(items) >= 2:
            if text[0] == "(" and text[-1] == ")":
                return Parts("tuple", items)
            if text[0] == "[" and text[-1] == "]":
                return Parts("bracket", items, (True, True))
            return Parts("half", items, (text[0] == "[", text[-1] == "]"))
        return None
    items = tuple(split_list(text))
    return Parts("list", items, joints=_joints(text)) if len(items) > 1 else None


def _joints(text: str) -> frozenset[str]:
    found = (re.sub(r"[^a-z]|text", "", match.group().lower()) for match in _JOIN.finditer(text))
    return frozenset({"vee": "lor", "wedge": "land"}.get(joint, joint) for joint in found)


def _joined_otherwise(gold: Parts, answer: Parts) -> bool:
    """Do the items stand in another relation? `or` may join solutions, but neither names nor logical formulas."""
    if any(_RELATION.search(item) or "=" in item for item in (*gold.items, *answer.items)):
        return False
    left, right = ({joint.removeprefix("l") for joint in parts.joints} for parts in (gold, answer))
    words = any(re.search(r"[^\W\d_]{2,}", re.sub(r"\\[a-zA-Z]+", "", plain(item))) for item in gold.items)
    if words or not {"lor", "land"}.isdisjoint(gold.joints | answer.joints):
        return left != right and "or" in left | right
    return left == {"and"} and "or" in right  # a gold's `2 or 3` are two solutions


def _one_bracket(text: str) -> bool:
    return closes_at_end(text)


def same_parts(gold: Parts, answer: Parts, same: Same) -> bool:
    if _joined_otherwise(gold, answer):
        return False
    if len(gold.items) != len(answer.items):
        left, right = _distinct(gold, same), _distinct(answer, same)
        if left is None or right is None or len(left) != len(right):
            return False
        return _unordered(left, right, same)
    if len(gold.items) > MAX_ITEMS:
        return False
    shapes = {gold.shape, answer.shape}
    if "half" in shapes:
        return shapes == {"half"} and gold.closed == answer.closed and _ordered(gold.items, answer.items, same)
    if shapes in ({"set", "tuple"}, {"set", "bracket"}) or (shapes == {"tuple", "bracket"} and len(gold.items) == 2):
        return False
    if gold.shape == "list" and answer.shape == "list" and _named(gold.items) and _named(answer.items):
        return _by_name(gold.items, answer.items, same)
    if gold.shape == "tuple" or answer.shape == "tuple" or gold.shape == "bracket":
        return _ordered(_in_name_order(gold), _in_name_order(answer), same)
    if _named(gold.items) != _named(answer.items):
        return _ordered(_in_name_order(gold), _in_name_order(answer), same)
    return _unordered(gold.items, answer.items, same)


def _distinct(parts: Parts, same: Same) -> list[str] | None:
    """Without repetitions, for sets and lists (`{2, 2}` is `{2}`); None for ordered structures."""
    if parts.shape not in ("set", "list") or len(parts.items) > 12:
        return None
    kept: list[str] = []
    for item in parts.items:
        if not any(same(other, item) for other in kept):
            kept.append(item)
    return kept


def _names(items: Sequence[str]) -> list[str]:
    return [re.sub(r"\s+", "", split_name(item)[0]) for item in items]


def _named(items: Sequence[str]) -> bool:
    """Does every item carry a name, all different (`x = 1, y = 2`)?"""
    names = _names(items)
    return all(names) and len(set(names)) == len(names)


def _in_name_order(parts: Parts) -> tuple[str, ...]:
    if parts.shape == "list" and _named(parts.items):
        return tuple(split_name(item)[1] for item in sorted(parts.items, key=lambda item: split_name(item)[0]))
    return parts.items


def _by_name(gold: Sequence[str], answer: Sequence[str], same: Same) -> bool:
    values = dict(zip(_names(answer), answer, strict=True))
    return all(name in values and same(item, values[name]) for name, item in zip(_names(gold), gold, strict=True))


def _ordered(gold: Sequence[str], answer: Sequence[str], same: Same) -> bool:
    return all(same(g, a) for g, a in zip(gold, answer, strict=True))


def _unordered(gold: Sequence[str], answer: Sequence[str], same: Same) -> bool:
    """Pairs off what is written alike, then greedily, which is exact: being the same is an equivalence."""
    written: dict[str, list[str]] = {}
    for item in answer:
        written.setdefault(key(item), []).append(item)
    rest = [item for item in gold if not _take(written, key(item))]
    left = [item for items in written.values() for item in items]
    if len(rest) > MAX_REWRITTEN:
        return False
    for item in rest:
        match = next((i for i, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def _take(written: dict[str, list[str]], name: str) -> bool:
    """Takes one item of that name out, if there is any."""
    items = written.get(name)
    if not items:
        return False
    items.pop()
    return True


@dataclasses.dataclass(frozen=True)
class Interval:
    low: str
    low_closed: bool
    high: str
    high_closed: bool


_INF = r"\infty"
_RELATION = re.compile(r"\s*(\\leq?(?![a-zA-Z])|\\geq?(?![a-zA-Z])|\\lt(?![a-zA-Z])|\\gt(?![a-zA-Z])|<=|>=|<|>)\s*")
_VARIABLE = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?|[a-z]\([a-z]\)")
_OPERATORS = {r"\le": "<=", r"\leq": "<=", r"\ge": ">=", r"\geq": ">=", r"\lt": "<", r"\gt": ">"}
_UNION = re.compile(
    r"\s*(?:\\cup(?![a-zA-Z])|(?<=[\])])\s*U\s*(?=[\[(])|\\text\{\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\(?:lor|vee)(?![a-zA-Z]))\s*"
)


_SIZE = re.compile(
    r"\|\s*[a-zA-Z]\s*(?:([-+])\s*([^|<>,;]+))?\|\s*(\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|<=|>=|<|>)\s*([^,;|<>\\]+)"
)


def parse_intervals(text: str) -> tuple[Interval, ...] | None:
    r"""The union that a text writes as `[0, 1) \cup (2, \infty)`, `0 \le x < 1`, `x > 3 or x < 1`; None otherwise."""
    text = re.sub(r"^\\?[a-zA-Z]\s*\\in(?![a-zA-Z])\s*", "", text.strip())
    if len(text) > 400:
        return None
    text = re.sub(r"^\\\{\s*[a-zA-Z]\s*(?:\\in\s*\S+\s*)?(?:\||:|\\mid)\s*(.*)\\\}$", r"\1", text)  # set-builder
    if is_real_line(text) or plain(text) == "R":
        return (Interval("-" + _INF, False, _INF, False),)
    pieces = [_intervals(piece.strip()) or _both_bounds(piece) for piece in _UNION.split(text)]
    return tuple(interval for piece in pieces for interval in piece) if all(pieces) else None


def is_real_line(text: str) -> bool:
    return plain(text).lower() in (
        *(r"\mathbb{r}", r"\mathbb r", "all real numbers", "all reals", "the real numbers", "the set of real numbers"),
        *("set of all real numbers", "the set of all real numbers", "real numbers", "all real values", "all numbers"),
    )


_DOMAIN_RANGE = re.compile(
    r"(?:the )?(?:(?i:domain)\b\s*(?:is|of \S+ is)?\s*[:=]?|D\s*[:=])(?P<domain>.+?)[,;.]?\s*"
    r"(?:and )?\s*(?:the )?(?:(?i:range)\b\s*(?:is|of \S+ is)?\s*[:=]?|R\s*[:=])(?P<range>.+)"
)


def parse_domain_range(text: str) -> tuple[str, str] | None:
    """The values of `Domain: ..., Range: ...` or `D = ..., R = ...`."""
    match = _DOMAIN_RANGE.fullmatch(plain(text).strip())
    if match is None:
        return None
    first, second = match.group("domain").strip(" ,;.:="), match.group("range").strip(" ,;.:=")
    return (first, second) if first and second else None


def _intervals(text: str) -> tuple[Interval, ...]:
    """One piece of a union: an interval, or the two that `x \\ne 2` and `|x| > 2` are; () for anything else."""
    hole = re.fullmatch(r"([a-zA-Z])\s*(?:\\ne(?![a-zA-Z])|!=)\s*([^,;]+)", text)
    if hole:
        return Interval("-" + _INF, False, hole.group(2), False), Interval(hole.group(2), False, _INF, False)
    size = _SIZE.fullmatch(text)
    if size:
        sign, shift, relation, bound = size.groups()
        operator = _OPERATORS.get(relation, relation)
        closed, low = len(operator) == 2, f"-({bound})"
        if shift:  # |x - 1| < 2
            centre = f"-({shift})" if sign == "+" else f"({shift})"
            low, bound = f"{centre}-({bound})", f"{centre}+({bound})"
        if operator[0] == "<":
            return (Interval(low, closed, bound, closed),)
        return Interval("-" + _INF, False, low, closed), Interval(bound, closed, _INF, False)
    interval = _interval(text)
    return (interval,) if interval else ()


_BOTH = re.compile(r"\s*(?:\\text\{\s*and\s*\}|(?<![a-zA-Z\\])and(?![a-zA-Z])|\\(?:land|wedge)(?![a-zA-Z]))\s*")


def _both_bounds(text: str) -> tuple[Interval, ...]:
    """`x > 1 and x < 3` as one interval; () for anything else."""
    pieces = _BOTH.split(text)
    if len(pieces) != 2 or variable_of(pieces[0]) != variable_of(pieces[1]):
        return ()
    bounds = [_interval(piece) for piece in pieces]
    lows = [bound for bound in bounds if bound and bound.high == _INF]
    highs = [bound for bound in bounds if bound and bound.low == "-" + _INF]
    if len(lows) != 1 or len(highs) != 1:
        return ()
    return (Interval(lows[0].low, lows[0].low_closed, highs[0].high, highs[0].high_closed),)


def _interval(text: str) -> Interval | None:
    text = text.strip()
    if len(text) > 2 and (text[0] == "]" or text[-1] == "[") and text[0] in "[]" and text[-1] in "[]":  # ]1, 2]
        text = ("(" if text[0] == "]" else "[") + text[1:-1] + (")" if text[-1] == "[" else "]")
    parts = parse_parts(text)
    if parts and parts.shape in ("tuple", "bracket", "half") and len(parts.items) == 2:
        left, right = (True, True) if parts.shape == "bracket" else parts.closed
        return Interval(_endpoint(parts.items[0]), left, _endpoint(parts.items[1]), right)
    words = _RELATION.split(text)
    if len(words) not in (3, 5):
        return None
    sides, operators = words[0::2], [_OPERATORS.get(word, word) for word in words[1::2]]
    if len(sides) == 3:
        if not _VARIABLE.fullmatch(sides[1].strip()) or operators[0][0] != operators[1][0]:
            return None
        low, high = (sides[0], sides[2]) if operators[0][0] == "<" else (sides[2], sides[0])
        closed = [len(o) == 2 for o in (operators if operators[0][0] == "<" else operators[::-1])]
        return Interval(_endpoint(low), closed[0], _endpoint(high), closed[1])
    left, right = (side.strip() for side in sides)
    if _VARIABLE.fullmatch(left) and not _VARIABLE.fullmatch(right):
        upper = operators[0][0] == "<"
        bound = right
    elif _VARIABLE.fullmatch(right) and not _VARIABLE.fullmatch(left):
        upper = operators[0][0] == ">"
        bound = left
    else:
        return None
    closed_here = len(operators[0]) == 2
    return (
        Interval("-" + _INF, False, _endpoint(bound), closed_here)
        if upper
        else Interval(_endpoint(bound), closed_here, _INF, False)
    )


def _endpoint(text: str) -> str:
    text = text.strip()
    return re.sub(
        r"^([+-]?)\s*(?:\\infty|infinity|inf|oo)\b", lambda m: ("-" if m.group(1) == "-" else "") + _INF, text
    )


def variable_of(text: str) -> str:
    """The variable that an inequality bounds ("" for interval notation)."""
    sides = _RELATION.split(text)[0::2]
    for piece in sides[1:2] if len(sides) == 3 else sides:  # a < b < c bounds b
        if _VARIABLE.fullmatch(piece.strip()):
            return piece.strip()
    return ""


def same_intervals(gold: Sequence[Interval], answer: Sequence[Interval], same: Same) -> bool:
    if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
        return False
    left = list(answer)
    for interval in gold:
        match = next((i for i, other in enumerate(left) if _same_interval(interval, other, same)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _same_interval(gold: Interval, answer: Interval, same: Same) -> bool:
    def bound(g: str, g_closed: bool, a: str, a_closed: bool) -> bool:
        if g.endswith(_INF) or a.endswith(_INF):
            return g == a  # closed at infinity says nothing
        return g_closed == a_closed and same(g, a)

    return bound(gold.low, gold.low_closed, answer.low, answer.low_closed) and bound(
        gold.high, gold.high_closed, answer.high, answer.high_closed
    )


_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)


def parse_matrix(text: str) -> tuple[tuple[str, ...], ...] | None:
    r"""The rows of `\begin{pmatrix}...\end{pmatrix}` or `[[1, 2], [3, 4]]`, or None."""
    text = text.strip()
    match = _MATRIX.fullmatch(text.strip("()[] "))
    if match:
        rows = [
            tuple(cell.strip() for cell in row.split("&"))
            for row in re.split(r"\\\\|\\cr", match.group(2))
            if row.strip()
        ]
    elif re.match(r"[\[(]\s*[\[(]", text) and closes_at_end(text):
        inner = [parse_parts(row) for row in split_top(text[1:-1])]
        if not all(inner) or not inner:
            return None
        rows = [part.items for part in inner if part]
    else:
        return None
    if not rows or len({len(row) for row in rows}) != 1 or len(rows) * len(rows[0]) > MAX_ITEMS:
        return None
    return tuple(rows)


def same_matrix(gold: Sequence[Sequence[str]], answer: Sequence[Sequence[str]], same: Same) -> bool:
    return len(gold) == len(answer) and all(
        len(g) == len(a) and _ordered(g, a, same) for g, a in zip(gold, answer, strict=True)
    )
