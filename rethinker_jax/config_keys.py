"""The names of all config keys: their table, the nearest name to a wrong one, and the listing that the help prints."""

import ast
import dataclasses
import difflib
import inspect
import io
import tokenize
import typing
from collections.abc import Iterable, Mapping

from rethinker_jax import config, config_curation, config_health, config_rewards
from rethinker_jax.config import Config


def _key_types(kind: type, prefix: str = "") -> dict[str, typing.Any]:
    """Key → type of a section; the keys of a section inside it are dotted (`length.max_tokens`)."""
    found: dict[str, typing.Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= _key_types(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


SECTIONS: dict[str, type] = typing.get_type_hints(Config)
KEY_TYPES: dict[str, dict[str, typing.Any]] = {name: _key_types(kind) for name, kind in SECTIONS.items()}
# Section → its keys whose values map names to values; a name can be set alone, as in `reward.terms.format=0.1`.
MAPPINGS: dict[str, tuple[str, ...]] = {
    section: tuple(key for key, hint in keys.items() if typing.get_origin(hint) is Mapping)
    for section, keys in KEY_TYPES.items()
}
ALL_KEYS: tuple[str, ...] = tuple(f"{section}.{key}" for section, keys in KEY_TYPES.items() for key in keys)
_TYPE_WORDS = {
    "Positive": "int >= 1",
    "NonNegative": "int >= 0",
    "PositiveFloat": "float > 0",
    "NonNegativeFloat": "float >= 0",
    "Fraction": "0 to 1",
    "Policy": "ignore, warn or stop",
}


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """One key as the help shows it. `type` and `comment` are the text of the source."""

    name: str
    type: str
    default: object
    comment: str


def is_key(section: str, key: str) -> bool:
    """Whether a known section has this key, be it one name in a mapping."""
    return key in KEY_TYPES[section] or mapping_of(section, key) is not None


def mapping_of(section: str, key: str) -> str | None:
    """The mapping in which a key such as `terms.format` sets one name."""
    return next((name for name in MAPPINGS[section] if key.startswith(name + ".") and len(key) > len(name) + 1), None)


def nearest(word: str, words: Iterable[str]) -> str:
    """ "; did you mean X?" with the nearest of `words`, or "" where none is near."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def nearest_key(section: str, key: str) -> str:
    """ "; did you mean section.key?" for a key that does not exist.

    A near name or an abbreviation (`lr`) in the same section comes first, then the same name in another section, then a
    near full name; where a known section has nothing near, its keys are listed.
    """
    keys = list(KEY_TYPES.get(section, ()))
    in_section = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    in_section += [name for name in keys if "".join(word[0] for word in name.split("_")) == key]
    if in_section:
        return f"; did you mean {section}.{in_section[0]}?"
    elsewhere = [f"{name}.{key}" for name, names in KEY_TYPES.items() if key in names]
    if not elsewhere and key in KEY_TYPES and section != key:
        return f"; did you mean the section {key} ({key}.{next(iter(KEY_TYPES[key]))}, ...)?"
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; {section} has {', '.join(keys)}" if keys else nearest(f"{section}.{key}", ALL_KEYS)


def describe_config(sections: Iterable[str] = SECTIONS) -> list[ConfigKey]:
    """Every key of the named sections, in the order of the source."""
    classes, comments = _read_sources()
    default = Config()
    found = []
    for section in sections:
        values = dataclasses.asdict(default)[section]
        pending = [(section, values, node) for node in classes[SECTIONS[section].__name__].body]
        while pending:
            prefix, values, node = pending.pop(0)
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            key, kind = node.target.id, ast.unparse(node.annotation)
            if kind in classes:  # a section inside the section
                pending = [(f"{prefix}.{key}", values[key], inner) for inner in classes[kind].body] + pending
            else:
                comment = comments.get(id(node), "")
                found.append(ConfigKey(f"{prefix}.{key}", kind, values[key], comment))
    return found


def _read_sources() -> tuple[dict[str, ast.ClassDef], dict[int, str]]:
    """(classes by name, the comment behind each of their statements by its identity) of the files that hold keys."""
    classes: dict[str, ast.ClassDef] = {}
    comments: dict[int, str] = {}
    for module in (config, config_curation, config_health, config_rewards):
        source = inspect.getsource(module)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        of_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        found = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        classes |= {node.name: node for node in found}
        comments |= {id(one): of_line.get(one.end_lineno or one.lineno, "") for node in found for one in node.body}
    return classes, comments


def listing(sections: Iterable[str] = SECTIONS) -> str:
    """The keys as lines for `--help`: `section.key=default  (type) comment`."""
    lines: list[str] = []
    for section in sections:
        lines.append(f"\n{section}: {_first_line(SECTIONS[section])}".rstrip(": "))
        for key in describe_config([section]):
            note = f"  {key.comment}" if key.comment else ""
            lines.append(f"  {key.name}={_short(key.default)}  ({_TYPE_WORDS.get(key.type, key.type)}){note}")
    return "\n".join(lines)


def _first_line(kind: type) -> str:
    """The first line of a written docstring; dataclasses without one get a signature, which is left out."""
    text = (kind.__doc__ or "").strip()
    return "" if text.startswith(f"{kind.__name__}(") else text.splitlines()[0]


def _short(value: object) -> str:
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    text = repr(text) if "\n" in text else text
    return text if len(text) <= 60 else text[:57] + "..."
