"""Option letters in every dress: `B`, `(b)`, `B. 15 cm`, `Option B`, the option's own text or its value.

Naming two options is wrong for a gold of one (a hedge), and so is a letter with another option's text.
"""

import re
from collections.abc import Callable, Sequence

from rethinker_jax.verify.normalize import key, plain
from rethinker_jax.verify.texts import text_key

Same = Callable[[str, str], bool]

_LEAD = re.compile(
    r"^\s*(?:the\s+|my\s+)?(?:(?:correct|final|best|right)\s+)*(?:answer|option|choice|options|choices|letter)s?\s*(?:is|are|:|=)?\s*(?:option|choice)?\s*(?=[(\[]?[A-Za-z][)\].:,]?(?:\s|$|[^a-zA-Z]))",
    re.IGNORECASE,
)
_IT_IS = re.compile(r"^(?:it is|it's)\s+(?=[(\[]?[A-Z][)\]]?\s*\.?$)", re.IGNORECASE)
_TAIL = re.compile(r"(?<=[A-Z)])\s+is\s+(?:the\s+)?(?:correct|right|best)?\s*(?:answer|option|choice)?\.?$")
_ONE = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:,)]?")
_SEVERAL = re.compile(
    r"[(\[]?[A-Z][)\]]?(?:\s*(?:,|/|;|&|\+|\band\b|\bor\b|\\text\{(?:and|or)\}|,\s*and\b|\s)\s*[(\[]?[A-Z][)\]]?)+\.?"
)
_LETTERED = re.compile(r"(?:[(\[]\s*([A-Za-z])\s*[)\]]\s*[.:]?|([A-Z])\s*[.:),])\s*[-–]?\s*(.+)", re.DOTALL)
_SPACED = re.compile(r"([A-Z])\s+(.+)", re.DOTALL)
_DENIED = re.compile(r"(?:not|wrong|incorrect)[.!]?$|\bis (?:not|wrong|incorrect|false)\b", re.IGNORECASE)
_TEXT_FIRST = re.compile(r"(.+?)\s*[(\[]([A-Z])[)\]]", re.DOTALL)
_OTHER_LETTER = re.compile(
    r"\b(?:or|and|not|nor|/|maybe)\s+\(?[A-Z]\)?(?:\b|$)|[,;/]\s*\(?[A-Z]\)?\s*(?:[.:)]|$)|\([A-Z]\)"
)

_ANOTHER = re.compile(
    r"(?i:(?:option|choice|answer|letter)\s+)?[(\[]?([A-K])[)\]]?(?:\s*[.:)]|\s+(?:is|was|not|may|might|instead|rather|too)\b|$)"
)
_HEDGE = re.compile(
    r"^(?i:both|none(?! of the)|neither|either|maybe|perhaps|possibly|probably|wait|sorry)\b"
    r"|(?i:\bi meant?|not sure|unsure)\b"
    r"|(?i:\b(?:wrong|incorrect|maybe|perhaps|possibly|probably))[.!?]?$"
    r"|\b(?:perhaps|possibly|probably|instead|rather|actually|but|mean) (?:option )?\(?[A-K]\b"
)


def option_texts(choices: Sequence[str]) -> tuple[str, ...]:
    """The choices without their own letters (`A. 3` → `3`), where every choice carries the letter of its place."""
    stripped = []
    for index, choice in enumerate(choices):
        letter = chr(65 + index)
        match = re.match(rf"\s*(?:\({letter}\)|{letter}\s*[.:)])\s*(.*)", choice, re.DOTALL)
        if not match or (not match.group(1).strip()):
            return tuple(choices)
        stripped.append(match.group(1).strip())
    return tuple(stripped)


def gold_letters(gold: str, options: Sequence[str], same: Same, letters_wanted: bool = False) -> frozenset[str] | None:
    """The letters that a gold stands for: its own letters, or those of the one option with its text or value.

    `letters_wanted`: the row says that it is about options, so `BD` is two letters even where no options are given.
    """
    bare = plain(gold)
    one = _ONE.fullmatch(bare)
    if one and one.group(1).isupper() and _in_range(one.group(1), options):
        return frozenset(one.group(1))
    if (
        re.fullmatch(r"[A-Z]{2,8}" if options else r"[A-K]{2,6}", bare)
        and (options or letters_wanted)
        and len(set(bare)) == len(bare)
        and all(_in_range(c, options) for c in bare)
        and bare not in options
    ):
        return frozenset(bare)
    if _SEVERAL.fullmatch(bare):
        letters = frozenset(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", bare))
        if all(_in_range(letter, options) for letter in letters):
            return letters
    match = _LETTERED.fullmatch(bare)
    if match:
        letter = (match.group(1) or match.group(2)).upper()
        if _in_range(letter, options) and (not options or _is_option(match.group(3), options[ord(letter) - 65], same)):
            return frozenset(letter)
    index = _unique_option(gold, options, same)
    return None if index is None else frozenset(chr(65 + index))


def chosen_letters(
    answer: str, options: Sequence[str], same: Same, multiple: bool
) -> tuple[frozenset[str] | None, str]:
    """The letters that an answer names, or None, and the rule.

    `multiple`: the gold has several letters, so `AC` may be two.
    """
    bare = re.sub(r"\s+", " ", plain(answer).replace("*", "")).strip()
    bare = re.sub(r"^\\\{\s*([A-Z])\s*\\\}$", r"\1", bare)
    bare = _TAIL.sub("", _LEAD.sub("", _IT_IS.sub("", bare))).strip()
    one = _ONE.fullmatch(bare)
    if one and _in_range(one.group(1).upper(), options):
        return frozenset(one.group(1).upper()), "letter"
    written = _written_options(answer, options)
    if _SEVERAL.fullmatch(bare) and len(written) == 1 and not multiple:  # `A and B` is what option C says
        return frozenset(chr(65 + written[0])), "option_text"
    if _SEVERAL.fullmatch(bare) or (multiple and re.fullmatch(r"[A-Z]{2,8}", bare)):
        if re.search(r"\bor\b|/", bare):
            return None, "hedge"
        found = re.findall(r"[A-Z]", re.sub(r"\band\b", "", bare))
        return frozenset(found), "letters"
    match = _LETTERED.fullmatch(bare)
    if match and _in_range((match.group(1) or match.group(2)).upper(), options):
        letter, text = (match.group(1) or match.group(2)).upper(), match.group(3)
        if options:
            if _is_option(text, options[ord(letter) - 65], same):
                return frozenset(letter), "letter_and_text"
            if not any(key(option) == key(bare) for option in options):
                return None, "letter_text_conflict"
        elif _OTHER_LETTER.search(text) or _DENIED.match(text) or _is_hedge(text, letter):
            return None, "hedge"
        else:
            return frozenset(letter), "letter_and_text"
    match = _SPACED.fullmatch(bare) or _TEXT_FIRST.fullmatch(bare)
    if match and options:
        letter, text = (match.group(1), match.group(2)) if match.re is _SPACED else (match.group(2), match.group(1))
        if _in_range(letter, options):
            if _is_option(text, options[ord(letter) - 65], same):
                return frozenset(letter), "letter_and_text"
            if _unique_option(text, options, same) is not None:
                return None, "letter_text_conflict"
    index = _unique_option(answer, options, same)
    if index is not None:
        return frozenset(chr(65 + index)), "option_text"
    return None, "no_option"


def _in_range(letter: str, options: Sequence[str]) -> bool:
    return len(letter) == 1 and "A" <= letter <= (chr(64 + len(options)) if options else "Z")


def _is_option(text: str, option: str, same: Same) -> bool:
    return (
        key(text) == key(option) or (bool(text_key(text)) and text_key(text) == text_key(option)) or same(option, text)
    )


def _is_hedge(text: str, letter: str) -> bool:
    """Does what follows a letter, where no options are given, take it back or name another one?"""
    other = _ONE.fullmatch(text) or _ANOTHER.match(text)
    named = other.group(1) if other else letter
    return (named != letter and "A" <= named <= "K") or bool(_HEDGE.search(text))


def _written_options(text: str, options: Sequence[str]) -> list[int]:
    """The places of the options that `text` writes out."""
    written = [i for i, option in enumerate(options) if key(option) == key(text)]
    if written:
        return written
    wanted = text_key(text)
    return [i for i, option in enumerate(options) if wanted and wanted == text_key(option)]


def _unique_option(text: str, options: Sequence[str], same: Same) -> int | None:
    """The place of the one option that `text` writes out, or else of the one whose value it has."""
    written = _written_options(text, options)
    if len(written) == 1:
        return written[0]
    if written:
        return None
    equal = [i for i, option in enumerate(options) if same(option, text)]
    return equal[0] if len(equal) == 1 else None
