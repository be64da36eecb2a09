r"""LaTeX and plain formulas read into trees: what a pupil writes as a value, and nothing more.

A tree is a tuple: `("number", Fraction)`, `("name", "x_1")`, `("constant", "pi")`, `("sum" | "product", (tree, ...))`,
`("quotient" | "power" | "root", tree, tree)` (the root's second part is its index), `("call", "sin", (tree, ...))`.
A derivative `dy/dx` is one name. Sums, integrals, operators, relations and ambiguous texts (`\sin x/2`, `3 4`, `x2`)
are refused with `Unread`.

Letters in a row are a product, capitals in a row a segment or figure (`AB` is `BA`, not `A` times `B`). `1/2x` is half
of x, `x/2y` is x over 2y. A whole number before a fraction of whole numbers is a mixed number.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rethinker_jax.verify.normalize import plain

Tree = tuple[Any, ...]


class Unread(Exception):
    """The text is no formula that this parser knows, or one that can be read in two ways."""


MINUS_ONE: Tree = ("number", Fraction(-1))
BARE_LOG = "bare_log"  # \log without a base: ten or e, as the gold decides
FUNCTIONS = {
    *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"),
    *("ln", "log", "lg", "exp"),
}
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
GREEK = {
    *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "hbar", "ell"),
    *("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega"),
}
_MARKS = {"overline", "bar", "vec", "hat", "overrightarrow", "widehat", "tilde", "angle", "triangle", "arc"}
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", r"\lvert": r"\rvert", "|": "|"}
_GROUPS = {"(", "[", "{", "|", r"\lvert"}
_BRACKET_CALLS = {r"\lfloor": "floor", r"\lceil": "ceil", r"\lvert": "abs", "|": "abs"}
_OPAQUE_FUNCTIONS = {"f", "g", "h", "P"}
_TIMES, _OVER = {"*", r"\cdot", r"\times"}, {"/", r"\div"}
_WORD = "|".join(sorted(({*FUNCTIONS, *_ALIASES, "sqrt", "pi", "theta", "abs"}) - {"lg"}))
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)|(?P<command>\\[a-zA-Z]+)"
    rf"|(?P<word>(?<![a-zA-Z])(?:{_WORD})(?![a-zA-Z]))|(?P<capitals>[A-Z]{{2,}}(?![a-z]))|(?P<letter>[a-zA-Z])|(?P<sign>\S))"
)


@lru_cache(maxsize=4096)
def read_formula(text: str, segments: bool = True) -> Tree:
    """The tree of a cleaned text (see `normalize.clean`); of an equation, left side minus right side. Raises Unread.

    `segments=False` reads capitals in a row as a product, for a gold that multiplies matrices or constants.
    """
    sides = [_read_whole(side, segments) for side in plain(text).split("=")]
    if len(sides) > 2:
        raise Unread(text)
    return sides[0] if len(sides) == 1 else ("sum", (sides[0], ("product", (MINUS_ONE, sides[1]))))


def _read_whole(text: str, segments: bool) -> Tree:
    reader = _Reader(text, segments)
    tree = reader.sum()
    if reader.token() != "" or "partial" in _names(tree):
        raise Unread(text)
    return tree


@lru_cache(maxsize=4096)
def names_in(text: str, segments: bool = True) -> tuple[str, ...]:
    """The variables of a text that `read_formula` reads, in order."""
    return tuple(sorted(_names(read_formula(text, segments))))


def _names(tree: Tree) -> frozenset[str]:
    if tree[0] == "name":
        return frozenset((tree[1],))
    return frozenset[str]().union(*(_names(part) for part in _parts(tree)))


def has(tree: Tree, kind: str, word: str) -> bool:
    """Does the tree hold the constant or the call of that name?"""
    return (tree[0] == kind and tree[1] == word) or any(has(part, kind, word) for part in _parts(tree))


def _parts(tree: Tree) -> tuple[Tree, ...]:
    if tree[0] in ("sum", "product"):
        return tree[1]
    if tree[0] == "call":
        return tree[2]
    return tree[1:] if tree[0] in ("quotient", "power", "root") else ()


def _integer(tree: Tree) -> bool:
    return tree[0] == "number" and tree[1].denominator == 1


class _Reader:
    """Recursive descent over the tokens of one text; the size guards have bounded its nesting before."""

    def __init__(self, text: str, segments: bool):
        self.tokens: list[tuple[str, str]] = []
        for match in _TOKEN.finditer(text):
            kind = match.lastgroup or ""
            token = match.group(kind)
            if kind == "word":
                kind, token = "command", "\\" + _ALIASES.get(token, token)
            if kind == "capitals" and not segments:
                self.tokens += [("letter", c) for c in token]
            else:
                self.tokens.append((kind, token))
        self.tokens.append(("end", ""))
        self.at = 0
        self.bars = 0  # is the innermost open bracket a |
        self.in_angle = False  # inside an argument of sin, cos, ...: degrees count

    def token(self, ahead: int = 0) -> str:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)][1]

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)][0]

    def take(self) -> str:
        token = self.token()
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unread(token)

    def sum(self) -> Tree:
        terms = []
        sign = self.take() if self.token() in ("+", "-") else "+"
        while True:
            term = self.term()
            terms.append(term if sign == "+" else ("product", (MINUS_ONE, term)))
            if self.token() not in ("+", "-"):
                return terms[0] if len(terms) == 1 else ("sum", tuple(terms))
            sign = self.take()

    def term(self) -> Tree:
        """Products and quotients from left to right; factors without a sign between them bind closer."""
        tree = self.juxtaposed()
        while True:
            if self.token() in _TIMES:
                self.take()
                tree = ("product", (tree, self.signed(self.juxtaposed)))
            elif self.token() in _OVER:
                self.take()
                if tree[0] == "number" and self.kind() == "number" and self.token(1) != "^":
                    tree = ("quotient", tree, self.postfix())
                    if self.starts_factor():
                        tree = ("product", (tree, self.juxtaposed()))
                else:
                    bottom = self.signed(self.juxtaposed)
                    tree = _derivative(tree, bottom) or ("quotient", tree, bottom)
            else:
                return tree

    def signed(self, read: Any) -> Tree:
        if self.token() in ("+", "-"):
            return ("product", (MINUS_ONE, self.signed(read))) if self.take() == "-" else self.signed(read)
        return read()

    def juxtaposed(self) -> Tree:
        first_is_integer = self.kind() == "number" and self.token().isdigit()
        tree = self.power()
        if first_is_integer and _integer(tree) and self.token() == r"\frac":
            part = self.power()
            if part[0] == "quotient" and _integer(part[1]) and _integer(part[2]):
                tree = ("sum", (tree, part))  # 2\frac{1}{3}
            else:
                tree = ("product", (tree, part))
        factors = [tree]
        while self.starts_factor():
            factors.append(self.power())
        return factors[0] if len(factors) == 1 else ("product", tuple(factors))

    def starts_factor(self) -> bool:
        """May a factor follow here without a sign of multiplication?"""
        kind, token = self.kind(), self.token()
        if kind == "number":
            if self.tokens[self.at - 1][0] == "command":
                return True  # \pi 2
            raise Unread("a number right after a factor")
        if kind in ("letter", "capitals"):
            return True
        if token == "|":
            return self.bars == 0
        if kind == "command":
            return token not in _TIMES and token not in _OVER and token not in (r"\rfloor", r"\rceil", r"\rvert")
        return token in ("(", "[", "{")

    def power(self) -> Tree:
        tree = self.postfix()
        if self.token() != "^":
            return tree
        self.take()
        return ("power", tree, self.exponent())

    def exponent(self) -> Tree:
        if self.token() in ("{", "("):
            tree = self.group()
        elif self.token() in ("-", "+"):
            return self.signed(self.exponent)
        else:
            tree = self.atom()
        if self.token() == "^":
            self.take()
            return ("power", tree, self.exponent())
        return tree

    def postfix(self) -> Tree:
        tree = self.atom()
        while self.token() in ("!", "°", "%"):
            sign = self.take()
            if sign == "!":
                tree = ("call", "factorial", (tree,))
            elif sign == "%":
                tree = ("quotient", tree, ("number", Fraction(100)))
            elif self.in_angle:
                tree = ("product", (tree, ("quotient", ("constant", "pi"), ("number", Fraction(180)))))
        return tree

    def group(self) -> Tree:
        """What a bracket of any kind holds; `|x|` and the like are calls."""
        opening = self.take()
        outer, self.bars = self.bars, int(opening == "|")
        tree = self.sum()
        self.bars = outer
        self.expect(_CLOSING[opening])
        return ("call", _BRACKET_CALLS[opening], (tree,)) if opening in _BRACKET_CALLS else tree

    def atom(self) -> Tree:
        kind, token = self.kind(), self.token()
        if kind == "number":
            return ("number", Fraction(self.take().replace(",", "").rstrip(".")))
        if token in _CLOSING:
            return self.group()
        if kind == "capitals":
            return self.named(min(token, token[::-1]) if len(token) == 2 else token)
        if kind == "letter":
            return self.letter()
        if kind == "command":
            return self.command()
        raise Unread(token)

    def letter(self) -> Tree:
        letter = self.token()
        if letter in _OPAQUE_FUNCTIONS and self.token(1) in ("(", "'"):
            self.take()
            while self.token() == "'":
                letter += self.take()
            if self.token() != "(":
                raise Unread(letter)
            return ("call", f"{letter}()", (self.group(),))
        if letter in ("e", "i") and self.token(1) not in ("_", "'"):
            self.take()
            return ("constant", letter)
        return self.named(letter)

    def named(self, name: str) -> Tree:
        """A variable with its subscript and primes."""
        self.take()
        while self.token() in ("_", "'"):
            name += self.take()
            if name.endswith("_"):
                name += self.raw()
        return ("name", name)

    def raw(self) -> str:
        """The next token, or all tokens of the next group, as they are written."""
        if self.token() != "{":
            return self.take()
        self.take()
        depth, words = 1, []
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return "".join(words)
            if token == "":
                raise Unread("unclosed group")
            words.append(token)

    def command(self) -> Tree:
        name = self.take()[1:]
        if name == "pi":
            return ("constant", "pi")
        if name in ("frac", "binom"):
            top, bottom = self.argument(), self.argument()
            if name == "binom":
                return ("call", "binomial", (top, bottom))
            return _derivative(top, bottom) or ("quotient", top, bottom)
        if name == "sqrt":
            index: Tree = ("number", Fraction(2))
            if self.token() == "[":
                index = self.group()
            return ("root", self.group() if self.token() == "(" else self.argument(), index)
        if name == "abs" and self.token() == "(":
            return ("call", "abs", (self.group(),))
        if name in FUNCTIONS:
            return self.function(name)
        if name == "partial":
            return ("name", name)
        if name in GREEK:
            self.at -= 1
            return self.named(name.removeprefix("var"))
        if name in _MARKS:
            letters = self.raw()
            return ("name", f"{name} {min(letters, letters[::-1]) if name in ('overline', 'angle') else letters}")
        raise Unread(name)

    def argument(self) -> Tree:
        """The argument of \\frac or \\sqrt: a group, or one token (of a number its first digit: `\\frac12`)."""
        if self.token() == "{":
            return self.group()
        kind, token = self.tokens[self.at]
        if kind == "number" and len(token) > 1:
            if not token.isdigit():
                raise Unread(token)
            self.tokens[self.at] = (kind, token[1:])
            return ("number", Fraction(token[0]))
        return self.atom()

    def function(self, name: str) -> Tree:
        base: Tree | None = None
        exponent: Tree | None = None
        for _ in range(2):
            if self.token() == "_" and name == "log" and base is None:
                self.take()
                base = self.argument() if self.token() == "{" else self.atom()
            elif self.token() == "^" and exponent is None:
                self.take()
                exponent = self.exponent()
        if exponent == ("product", (MINUS_ONE, ("number", Fraction(1)))):
            if name not in _INVERSE:
                raise Unread(name)
            name, exponent = _INVERSE[name], None
        outer, self.in_angle = self.in_angle, self.in_angle or name in ("sin", "cos", "tan", "cot", "sec", "csc")
        argument = self.function_argument()
        self.in_angle = outer
        if base is not None:
            tree: Tree = ("call", "log", (argument, base))
        elif name == "exp":
            tree = ("power", ("constant", "e"), argument)
        elif name == "lg":
            tree = ("call", "log", (argument, ("number", Fraction(10))))
        else:
            tree = ("call", BARE_LOG if name == "log" else name, (argument,))
        return tree if exponent is None else ("power", tree, exponent)

    def function_argument(self) -> Tree:
        """A bracket, or all factors up to the next sign or function: `\\sin 2x \\cos x`."""
        if self.token() in _GROUPS:
            return self.group()
        negative = self.token() == "-"
        if negative:
            self.take()
        factors = [self.power()]
        while self.starts_factor() and self.token()[1:] not in FUNCTIONS:
            factors.append(self.power())
        if self.token() in _OVER:
            raise Unread("a function before a quotient")
        tree = factors[0] if len(factors) == 1 else ("product", tuple(factors))
        return ("product", (MINUS_ONE, tree)) if negative else tree


def _derivative(top: Tree, bottom: Tree) -> Tree | None:
    """`dy/dx` as one name: a derivative is no quotient of variables. None for a quotient; an operator is not read."""
    sides = [tree[1] if tree[0] == "product" else (tree,) for tree in (top, bottom)]
    if len(sides[1]) < 2 or not all(_differential(side[0]) for side in sides):
        return None
    if len(sides[0]) < 2:
        raise Unread("an operator")  # d/dx before what it derives
    return ("name", f"derivative {sides}")


def _differential(tree: Tree) -> bool:
    """`d`, `\\partial`, `d^2`."""
    first = tree[1] if tree[0] == "power" else tree
    return first in (("name", "d"), ("name", "partial"))
