r"""One spelling for many: LaTeX, Unicode and damaged LaTeX brought to a canonical form before anything is compared.

`clean` keeps meaning: `\text{...}` stays marked, case stays, units stay. `plain` drops the marks that only say how a
thing is printed. `split_name` takes `Volume $=904.78 \mathrm{~cm}^{3}$` apart into its name and its value.
"""

import re
import unicodedata
from functools import lru_cache

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()")
_SUPERSCRIPT_RUN = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+")
_SUBSCRIPT_RUN = re.compile(r"[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎]+")
_ROOT = re.compile(r"(√|∛|∜)\s*(\d+(?:\.\d+)?|[a-zA-Z]|(?=[({]))")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "‐": "-", "‑": "-", "×": r"\times ", "✕": r"\times ", "÷": r"\div ",
    "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∠": r"\angle ",
    "△": r"\triangle ", "⊥": r"\perp ", "∥": r"\parallel ", "∈": r"\in ", "→": r"\to ", "⟶": r"\to ",
    "⇌": r"\rightleftharpoons ", "⇒": r"\Rightarrow ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ",
    "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ", "ρ": r"\rho ", "σ": r"\sigma ", "φ": r"\phi ",
    "ω": r"\omega ", "Δ": r"\Delta ", "º": "°", "˚": "°", "掳": "°", "∘": "°", "’": "'", "‘": "'", "“": '"',
    "”": '"', "′": "'", "″": '"', "，": ",", "：": ":", "；": ";", "（": "(", "）": ")", "％": "%", "⁄": "/",
    "∶": ":", "µ": "μ", "ℝ": r"\mathbb{R}",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
# Control characters that a JSON or Python reader made of a LaTeX command's first letters.
_DAMAGE = [
    (re.compile("\x0c(?=rac)"), r"\\f"),
    (re.compile("\x08(?=oxed|eta|egin|inom|ar)"), r"\\b"),
    (re.compile("\t(?=imes|ext|heta|an\\b|riangle|frac|au\\b|o\\b)"), r"\\t"),
    (re.compile("\r(?=ight|ho\\b|m\\b)"), r"\\r"),
    (re.compile("\x0b"), " "),
]
_DROPPED = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|textstyle|limits|nolimits|mathstrut|strut"
    r"|mathbin|mathrel|mathord|mathop|mathopen|mathclose)(?![a-zA-Z])|\\[,!;:]"
)
_SPACES = re.compile(r"(?:(?<!\\)\\(?:quad|qquad|enspace|thinspace| )(?![a-zA-Z])|~|(?<!\\)\\\s|\\hspace\s*\{[^{}]*\})")
_COLOR = re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}\s*|\\color\s*(?:\{[^{}]*\}|[a-z]+)\s*")
_FONT = re.compile(
    r"\\(?:mathrm|textrm|textup|textnormal|textbf|textit|textsf|texttt|mathbf|boldsymbol|bold|bf|mathit|mathsf|mathtt|operatorname\*?"
    r"|mbox|hbox|emph|underline|rm|it|text|ensuremath|boxed|fbox)(?![a-zA-Z])\s*"
)
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "arcsin", "arccos", "arctan", "lg"}
_RELATIONS = {"leq": r"\le", "geq": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">"}
_DEGREE = re.compile(
    r"\^\s*\{?\s*(?:\\circ|\\degree|°|o(?=\s*\}))\s*\}?|\\(?:degree|textdegree|circ(?!\s*\{?\d+(?!['\d])))(?![a-zA-Z])|\{degrees?\}|Â°"
)
# The command before a unit lost, as in `8\sqrt{3}{squareinches}`; short words may be a denominator's letters.
_LOST_TEXT = re.compile(
    r"(?:(?<=[\d})])|(?<=\\pi))(?<!array\})\s*\{\s*(square|sq|cubic)?\s*([a-z]{4,}|cm|mm|km|ft|min|sec|deg)\s*\}"
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_UPRIGHT = re.compile(r"\\text\{((?:[^{}]++|\{[^{}]*+\})*+)\}")  # whole formulas are set upright where it holds groups
_MATH_ENDS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'))


@lru_cache(maxsize=8192)
def clean(text: str) -> str:
    """The canonical spelling of one answer or gold. Never raises; linear passes over the text."""
    if text.isascii() and text.isalnum():
        return r"\infty" if text == "infinity" else text
    for damage, repair in _DAMAGE:
        text = damage.sub(repair, text)
    text = text.strip()
    text = _from_unicode(text)
    text = text.replace("**", "^") if re.search(r"[\w)]\s*\*\*\s*[-\w(]", text) else text
    text = strip_math(text)
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\cfrac", r"\frac")
    text = re.sub(r"\\math(?:bin|rel|ord|punct)\s*(\{[:,]\})", r"\1", text)
    text = text.replace(r"\%", "%").replace(r"\$", "$").replace("{,}", ",").replace("{:}", ":").replace(r"\colon", ":")
    text = text.replace(r"\langle", "(").replace(r"\rangle", ")")
    text = text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}").replace(r"\varnothing", r"\emptyset")
    text = (
        text.replace(r"\leqslant", r"\le ")
        .replace(r"\geqslant", r"\ge ")
        .replace(r"\dots", "...")
        .replace(r"\ldots", "...")
        .replace(r"\cdots", "...")
    )
    text = re.sub(r"(?<=\d)\\[,;! ]+(?=\d{3}(?!\d))", ",", text)  # a thin space between thousands
    text = (
        re.sub(r"(?<=\d)\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\\frac{\1}{\2}", text)
        if "frac" not in text
        else text
    )
    text = re.sub(r"^(-?)\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1\\frac{\2}{\3}", text)  # a lost \frac
    text = _DROPPED.sub(" ", text)
    text = _SPACES.sub(" ", text)
    text = _COLOR.sub("", text)
    text = _DEGREE.sub("°", text)
    text = _LOST_TEXT.sub(r"\\text{\1 \2}", text)
    text = _fonts(text)
    text = re.sub(r"\\text\s*\{\s*([kMGm])\s*\}\s*(?=\\Omega)", r"\1", text)  # one unit, set in two fonts
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt\s*(\d)(?!\d)", r"\\sqrt{\1}", text)
    text = (
        re.sub(
            r"\\pmod\s*(\w+)|\(\s*(?:\\text\s*\{)?\s*\\?[pb]?mod\s*\}?\s*\{?\s*(\w+)\s*\}?\s*\)", r"\\pmod{\1\2}", text
        )
        if "mod" in text
        else text
    )
    text = re.sub(r"\\(leq|geq|neq|lt|gt)(?![a-zA-Z])", lambda m: _RELATIONS[m.group(1)], text)
    text = re.sub(r"\\\{\s*\\\}", r"\\emptyset ", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([-+]?)\s*infinity", r"\1\\infty", text) if text.endswith("infinity") and len(text) < 12 else text
    return _strip_ends(text)


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = "".join(_vulgar(c) for c in text)
    text = text.replace("Â°", "°")
    text = _SYMBOL.sub(lambda m: _SYMBOLS[m.group()], text)
    text = _ROOT.sub(_root, text)
    text = unicodedata.normalize("NFKC", text)
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c in "\n\t")


def _vulgar(c: str) -> str:
    """½ → \\frac{1}{2}; everything else as it is."""
    if not unicodedata.decomposition(c).startswith("<fraction>"):
        return c
    numerator, slash, denominator = unicodedata.normalize("NFKC", c).partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}" if slash and denominator else c


def _root(match: re.Match[str]) -> str:
    degree = {"√": "", "∛": "[3]", "∜": "[4]"}[match.group(1)]
    argument = match.group(2)
    return rf"\sqrt{degree}{{{argument}}}" if argument else rf"\sqrt{degree}"


def _fonts(text: str) -> str:
    """Every font command becomes `\\text{...}`, but function names and single letters become mathematics again."""
    if "\\" not in text:
        return text
    text = _FONT.sub(r"\\text", text)
    text = re.sub(r"\\text\s*([a-zA-Z](?![a-zA-Z]))", r"\\text{\1}", text)
    text = re.sub(r"\\text(?![{a-zA-Z])\s*", "", text)
    for _ in range(4):  # fonts inside fonts
        flat = re.sub(r"\\text\{([^{}]*)\\text\{([^{}]*)\}([^{}]*)\}", r"\\text{\1\2\3}", text)
        if flat == text:
            break
        text = flat
    text = _UPRIGHT.sub(lambda m: m.group(1) if "{" in m.group(1) else m.group(), text)
    return re.sub(
        r"\\text\{\s*([a-z]+)\s*\}", lambda m: f"\\{m.group(1)} " if m.group(1) in _FUNCTIONS else m.group(), text
    )


def strip_math(text: str) -> str:
    """Without the delimiters around the whole (`$...$`, `\\(...\\)`, bold, quotes) and the dollars inside."""
    while True:
        for left, right in _MATH_ENDS:
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                inner = text[len(left) : -len(right)]
                if left not in inner and right not in inner:
                    text = inner.strip()
                    break
        else:
            break
    if text.count("$") >= 2 and not re.match(r"\$\s*\d[\d,.]*\s*(?:$|[a-z ])", text):
        text = re.sub(r"(?<!\\)\$", " ", text)
    return re.sub(r"\\[()\[\]]", " ", text)


def _strip_ends(text: str) -> str:
    """Without the full stop, comma or colon that ends a sentence, and without braces around the whole."""
    for _ in range(6):
        before = text
        text = text.strip().rstrip(",;:").rstrip()
        if text.endswith(".") and not text.endswith("..") and not re.search(r"\b[ap]\.m\.$", text):
            text = text[:-1].rstrip()
        if text.startswith("{") and text.endswith("}") and closes_at_end(text):
            text = text[1:-1]
        if text == before:
            break
    return text


def closes_at_end(text: str) -> bool:
    """Does the bracket that opens `text` close at its very end?"""
    depth = 0
    for index, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                return index == len(text) - 1
    return False


def plain(text: str) -> str:
    """Without `\\text{}` marks, empty groups and doubled spaces: what a reader sees."""
    if "\\text" in text:
        text = _TEXT.sub(r" \1 ", text)
    text = text.replace("{}", "")
    return re.sub(r"\s+", " ", text).strip()


def key(text: str) -> str:
    """The text without spaces and marks, case kept: equal keys are the same answer whatever its kind."""
    text = re.sub(r"(?<=[a-zA-Z]) (?=[a-zA-Z])|(?<=\d) (?=\d)", "␣", plain(text))  # `1 1/2` is not `11/2`
    return re.sub(
        r"\s+",
        "",
        re.sub(r"\^\{(\w)\}|_\{(\w)\}", lambda m: ("^" + m.group(1)) if m.group(1) else "_" + m.group(2), text),
    )


_NAME = re.compile(
    r"(?:(?:the|length|of|value|its|total|an?|side|line|segment)\s+)*"
    r"(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?"
    r"|\\(?:angle|triangle|overline|widehat|arc|measuredangle|overrightarrow|vec|hat|bar)\s*\{?[A-Za-z ]*\d?\}?"
    r"|m\s*\\angle\s*\{?[A-Z]*\d?\}?|[A-Za-z][\w' ]{0,40}|\\?[A-Za-z]+\s*\([A-Za-z]\)|[A-Z]{2,3})\s*(?:is)?"
)
_LABEL = re.compile(r"\s*([A-Za-z]{3,}(?: [A-Za-z]+){0,3})\s*:\s*(?=\S)")
_EQUALS = re.compile(r"(?<![<>!:=\\])\s*(?:=|\\approx(?![a-zA-Z])|\\colon=|:=)\s*(?!=)")


def split_name(text: str) -> tuple[str, str]:
    """(`name`, `value`) of `name = value`; the name is "" where there is none or it is not a name.

    Only words, a variable, a segment, an angle or `f(x)` count as a name: `2x+z = 1` is an equation, not a value. Words
    may end in a colon, and one letter may stand on the right (`12 = x`).
    """
    labelled = _LABEL.match(text)
    if labelled:
        return labelled.group(1), text[labelled.end() :]
    parts = _EQUALS.split(text, maxsplit=1)
    if len(parts) != 2:
        return "", text
    name, value = (plain(part).strip() for part in parts)
    if not value:
        return "", text
    if name == "" or (_NAME.fullmatch(name) and not re.fullmatch(r"[a-z]{2}", name)):
        return name, parts[1].strip()
    if re.fullmatch(r"[a-zA-Z]", value) and not re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", name):
        return value, parts[0].strip()
    return "", text
