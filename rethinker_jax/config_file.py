"""Configs in and out: YAML files with `base:`, `section.key=value` overrides, and one message for everything wrong.

A file is read as a list of settings, its base's first; overrides come last, and of two settings of one key the later
holds. So a list in a file replaces the list of its base, and every complaint can name the place a value came from.
YAML is read by its 1.2 core schema: `off`, `no` and `1:30` are text, `1e-6` is a number.
"""

import dataclasses
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import yaml
from yaml.composer import ComposerError

from rethinker_jax.config import Config
from rethinker_jax.config_check import check
from rethinker_jax.config_keys import KEY_TYPES, SECTIONS, is_key, mapping_of, nearest, nearest_key
from rethinker_jax.errors import UserError

PACKAGE_CONFIGS = Path(__file__).parent / "configs"
PACKAGE_PREFIX = "package:"
_ADAPTER = pydantic.TypeAdapter(Config)
_DEFAULTS = dataclasses.asdict(Config())
_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value for one key. `where` is the file and line, or the override, for messages.

    A key of a section inside the section, and one name of a mapping, is dotted: `length.max_tokens`, `terms.format`.
    """

    section: str
    key: str
    value: Any
    where: str


class ConfigLoader(yaml.SafeLoader):
    """Safe YAML without aliases (nothing can refer to itself) and without tags beyond the core schema."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # ty: ignore[incompatible-attribute-override]
    yaml_constructors: ClassVar[dict] = {}  # ty: ignore[incompatible-attribute-override]

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "aliases are not read here; write the value out", mark)
        return super().compose_node(parent, index)

    def number(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be something else to `ConfigLoader` (1e5) or to a reader of YAML 1.1 (off)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    ConfigLoader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)
ConfigLoader.add_constructor(_TAG + "null", lambda loader, node: None)
ConfigLoader.add_constructor(_TAG + "bool", lambda loader, node: node.value.lower() == "true")
ConfigLoader.add_constructor(_TAG + "int", lambda loader, node: int(node.value))
ConfigLoader.add_constructor(_TAG + "float", ConfigLoader.number)
ConfigLoader.add_constructor(_TAG + "str", yaml.SafeLoader.construct_yaml_str)
ConfigLoader.add_constructor(_TAG + "seq", yaml.SafeLoader.construct_yaml_seq)
ConfigLoader.add_constructor(_TAG + "map", yaml.SafeLoader.construct_yaml_map)
ConfigLoader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def find_config(name: str) -> Path:
    """A path, or `package:NAME` for a config that comes with the package. Does not ask whether the file is there."""
    if not name.startswith(PACKAGE_PREFIX):
        return Path(name)
    stem = name.removeprefix(PACKAGE_PREFIX).removesuffix(".yaml")
    known = sorted(path.stem for path in PACKAGE_CONFIGS.glob("*.yaml"))
    if stem not in known:
        raise UserError(f"{name}: no such config in the package{nearest(stem, known)} (there: {', '.join(known)})")
    return PACKAGE_CONFIGS / f"{stem}.yaml"


def load_config(path: Path | None, overrides: Sequence[str]) -> Config:
    """The config of a YAML file (None = the package's example) with overrides. All problems in one UserError."""
    settings, problems = read_file(path or find_config("package:example"))
    return _resolve(settings, problems, overrides)


def load_defaults(overrides: Sequence[str]) -> Config:
    """The defaults of `config.py` with overrides, for commands that need no config file."""
    return _resolve([], [], overrides)


def config_name(path: Path | None) -> str:
    """The name of a run, used in the default `run.dir`: the file's name without its ending."""
    return path.stem if path else "example"


def config_hash(config: Config) -> str:
    """Twelve hex digits that differ when any value of the config does."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def save_config(config: Config, path: Path) -> None:
    """Writes every key with its value; `load_config` of the file gives an equal config. Whole or not at all."""
    # Through JSON, because tuples are YAML lists.
    text = yaml.dump(json.loads(json.dumps(dataclasses.asdict(config))), Dumper=_Dumper, sort_keys=False, width=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("# Every key with the value it had; can be given to a command as it is.\n" + text, "utf-8")
    os.replace(temporary, path)


def read_file(path: Path, readers: tuple[Path, ...] = ()) -> tuple[list[Setting], list[str]]:
    """The settings of a file, those of its `base:` first, and what is wrong with the files.

    `readers` are the files whose chain of bases led here.
    """
    if path.resolve() in readers:
        chain = " -> ".join(str(reader.name) for reader in (*readers, path))
        return [], [f"{readers[-1]}: base: goes round in a circle: {chain}"]
    try:
        text = path.read_text("utf-8")
        root = yaml.compose(text, Loader=ConfigLoader)
    except FileNotFoundError:
        beside = [str(found) for found in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        return [], [f"{path}: no such config file{nearest(str(path), beside)}"]
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read as UTF-8 text: {error}"]
    except yaml.YAMLError as error:
        return [], [f"{path}: {_yaml_problem(error)}"]
    except RecursionError:
        return [], [f"{path}: not readable as YAML: too deep"]
    if root is None:  # an empty file
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{path}: wanted sections such as `run:`, came {text.strip()[:40]!r}"]
    base, settings, problems = _read_sections(root, path)
    if base is None:
        return settings, problems
    try:
        base_path = find_config(base)
    except UserError as error:
        return settings, [*problems, f"{path}: base: {error}"]
    base_settings, base_problems = read_file(path.parent / base_path, (*readers, path.resolve()))
    return [*base_settings, *settings], [*base_problems, *problems]


def _read_sections(root: yaml.MappingNode, path: Path) -> tuple[str | None, list[Setting], list[str]]:
    """The base's name, the settings and the problems of one file."""
    base: str | None = None
    settings: list[Setting] = []
    problems: list[str] = []
    seen: dict[tuple[str, ...], int] = {}

    def doubled(*name: str, line: int) -> bool:
        if name in seen:
            problems.append(f"{path} line {line}: {'.'.join(name)} is already given in line {seen[name]}")
            return True
        seen[name] = line
        return False

    for section_node, body in root.value:
        section, line = str(section_node.value), section_node.start_mark.line + 1
        if doubled(section, line=line):
            continue
        if section == "base":
            base = body.value if isinstance(body, yaml.ScalarNode) and body.value else None
            if base is None:
                problems.append(f"{path} line {line}: base: wanted one file name")
        elif section not in SECTIONS:
            problems.append(f"{path} line {line}: {section}: no such section{_section_hint(section)}")
        elif isinstance(body, yaml.MappingNode):
            pending = [(str(key_node.value), key_node, value_node) for key_node, value_node in body.value]
            while pending:
                key, key_node, value_node = pending.pop(0)
                line = key_node.start_mark.line + 1
                if doubled(section, key, line=line):
                    continue
                inner = any(name.startswith(f"{key}.") for name in KEY_TYPES[section])
                if inner and isinstance(value_node, yaml.MappingNode):  # a section inside the section
                    pending = [(f"{key}.{name.value}", name, value) for name, value in value_node.value] + pending
                    continue
                try:
                    value = _construct(value_node)
                except yaml.YAMLError as error:
                    problems.append(f"{path} line {line}: {section}.{key}: {_yaml_problem(error)}")
                else:
                    settings.append(Setting(section, key, value, f"{path} line {line}"))
        elif not (isinstance(body, yaml.ScalarNode) and body.tag == _TAG + "null"):
            problems.append(f"{path} line {line}: {section}: wanted keys with values, came {body.value!r}")
    return base, settings, problems


def _section_hint(section: str) -> str:
    """A wrong section may be a misspelt one, or a key that was written without its section."""
    homes = [f"{name}.{section}" for name, keys in KEY_TYPES.items() if section in keys]
    return f"; did you mean {' or '.join(homes)}?" if homes else nearest(section, [*SECTIONS, "base"])


def _construct(node: yaml.Node) -> Any:
    """The plain Python value of a composed node. Raises YAMLError, also for a name that a mapping has twice."""
    pending = [node]
    while pending:
        one = pending.pop()
        if isinstance(one, yaml.MappingNode):
            names = [str(name.value) for name, _ in one.value]
            twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
            if twice is not None:
                raise yaml.YAMLError(f"{twice} is given twice")
            pending += [value for _, value in one.value]
        elif isinstance(one, yaml.SequenceNode):
            pending += one.value
    loader = ConfigLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        return f"not readable as YAML: {error.problem or error.context}{place}"
    return f"not readable as YAML: {error}"


def read_override(text: str) -> Setting:
    """`section.key=value`. The value of a text key is taken as it stands, any other is read as YAML."""
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise UserError(f"override {text!r}: wanted section.key=value, such as run.seed=1")
    if section not in SECTIONS:
        raise UserError(
            f"override {text!r}: {section}: no such section{nearest(section, SECTIONS) or nearest_key(section, key)}"
        )
    if not is_key(section, key):
        raise UserError(f"override {text!r}: {section}.{key}: no such key{nearest_key(section, key)}")
    quoted = raw[:1] in ("'", '"')
    if KEY_TYPES[section].get(key) is str and not quoted:
        return Setting(section, key, raw, f"override {text!r}")
    try:
        value = yaml.load(raw, Loader=ConfigLoader)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: {_yaml_problem(error)}") from None
    except RecursionError:
        raise UserError(f"override {text!r:.80}: not readable as YAML: too deep") from None
    return Setting(section, key, value, f"override {text!r}")


def override_of(key: str, value: Any) -> str:
    """The override that gives a key this value, whatever stands in it."""
    return f"{key}={_ESCAPE.sub(_whole_character, json.dumps(value))}"


# An escape of JSON. A pair of halves is one character there, and two in YAML.
_ESCAPE = re.compile(r"\\(?:u(d[89ab]..)\\u(d[c-f]..)|.)")


def _whole_character(found: re.Match[str]) -> str:
    high, low = found.groups()
    return found[0] if high is None else f"\\U{0x10000 + (int(high, 16) - 0xD800 << 10) + int(low, 16) - 0xDC00:08x}"


def _resolve(settings: list[Setting], problems: list[str], overrides: Iterable[str]) -> Config:
    """Settings → Config; raises one UserError with every problem found on the way."""
    settings, problems = list(settings), list(problems)
    for override in overrides:
        try:
            settings.append(read_override(override))
        except UserError as error:
            problems.append(str(error))
    last: dict[tuple[str, str], Setting] = {}
    values: dict[str, dict[str, Any]] = {}
    for setting in settings:
        if not is_key(setting.section, setting.key):
            hint = nearest_key(setting.section, setting.key)
            problems.append(f"{setting.where}: {setting.section}.{setting.key}: no such key{hint}")
            continue
        last[setting.section, setting.key] = setting
        _place(values.setdefault(setting.section, {}), setting)
    try:
        # Strict JSON refuses "5" for a number and 1 for a truth value, but takes a list for a tuple.
        config = _ADAPTER.validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        problems += [_value_problem(dict(found), last) for found in error.errors()]
    else:
        problems += check(config)
        if not problems:
            return config
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UserError("\n  ".join([f"{count} in the configuration:", *problems]))


def _place(section: dict[str, Any], setting: Setting) -> None:
    """Puts a setting's value to its place in the nested values of its section."""
    mapping = mapping_of(setting.section, setting.key)
    if mapping is None:
        *inner, name = setting.key.split(".")
        for one in inner:
            section = section.setdefault(one, {})
        section[name] = setting.value
        return
    # One name of a mapping: added to what is there, which is the default where nothing was set.
    *inner, last = mapping.split(".")
    default = _DEFAULTS[setting.section]
    for one in inner:
        section, default = section.setdefault(one, {}), default[one]
    there = section.get(last, default[last])
    rest = setting.key.removeprefix(mapping + ".")
    value = setting.value
    if typing.get_origin(typing.get_args(KEY_TYPES[setting.section][mapping])[1]) is Mapping:
        outer, _, name = _split_names(rest)
        rest, value = outer, {**_mapping(_mapping(there).get(outer)), name: value} if name else value
    section[last] = {**_mapping(there), rest: value}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _split_names(text: str) -> tuple[str, str, str]:
    """`bbox.iou` → bbox and iou; a file's name keeps its dots: `rewards.py:f.scale` → rewards.py:f and scale."""
    file = re.fullmatch(r"(.+\.py:\w+)(\.)(\w+)", text)
    return (file[1], file[2], file[3]) if file else text.partition(".")


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list such as [a, b]",
    "dict_type": "names with values such as {a: 1}",
    "mapping_type": "names with values such as {a: 1}",
    "dataclass_type": "keys with values such as {a: 1}",
}


def _value_problem(error: dict[str, Any], last: dict[tuple[str, str], Setting]) -> str:
    """pydantic's complaint as: where, which key, what was wanted, what came, the nearest allowed word."""
    setting, key, index = _find_setting(error["loc"], last)
    wanted = _WANTED.get(error["type"]) or error["msg"].removeprefix("Input should be ")
    allowed = re.findall(r"'([^']*)'", error["msg"]) if error["type"] == "literal_error" else []
    hint = nearest(str(error["input"]), allowed)
    item = f" (item {index + 1} of the list)" if index is not None else ""
    return f"{setting.where}: {key}{item}: wanted {wanted}, came {error['input']!r}{hint}"


def _find_setting(
    location: Sequence[str | int], last: Mapping[tuple[str, str], Setting]
) -> tuple[Setting, str, int | None]:
    """The setting that gave the value at pydantic's location, the value's full key, its place in a list."""
    section, *path = location
    index = next((step for step in path if isinstance(step, int)), None)
    names = [str(step) for step in path if isinstance(step, str)]
    for length in range(len(names), 0, -1):
        setting = last.get((str(section), ".".join(names[:length])))
        if setting is not None:
            return setting, f"{section}.{'.'.join(names)}", index
    raise AssertionError(f"no setting led to {location}")
