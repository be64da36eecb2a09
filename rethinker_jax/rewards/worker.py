"""One process for reward functions of your own: JSON lines in on stdin, out on stdout. Started as a module.

    out  {"ready": true, "batched": [false], "cpu_s": 0.1}             after all functions are loaded
    in   {"function": 0, "rows": [{...}, ...]}
    out  {"values": [0.5], "cpu_s": 0.1}                  a line per row; a batch function gives one for all of them
    out  {"error": {"what": ..., "row": "..."}, "cpu_s": 0.1}          instead, and the process ends

The protocol has descriptors of its own: what a function prints goes to stderr, and what it reads of stdin is the end of
a file. On Linux the process ends with the trainer, whatever it does; elsewhere when it next reads a call. jax, where a
function imports it, finds no accelerator here. A function's file may import its neighbours.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import numbers
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rethinker_jax.config_check import USER_TERM
from rethinker_jax.config_keys import nearest
from rethinker_jax.verify.worker import end_with_parent, take_protocol

Contract = Literal["row", "single", "sequential", "batch", "lists"]
OVERALL = "overall"
MAX_ERROR_BYTES = 1 << 20  # of what functions have printed and is kept
ACCEPTED = (
    "f(row: dict) -> float or dict of named parts; EasyR1's compute_score(reward_inputs: list[dict]) -> "
    'list[dict with "overall"], compute_score(reward_input: dict) -> dict with "overall", or '
    "compute_score(predict_str, ground_truth) -> float"
)


class Faulty(Exception):
    """A function that cannot be used. `row` is the id of the row at which it was seen, "" for none."""

    def __init__(self, what: str, row: str = ""):
        super().__init__(what)
        self.row = row


@dataclasses.dataclass(frozen=True)
class UserFunction:
    """A loaded function, its file, how it wants to be called, and the keyword arguments it gets besides."""

    name: str
    file: Path
    function: Callable[..., Any]
    contract: Contract
    kwargs: Mapping[str, Any]

    @property
    def batched(self) -> bool:
        return self.contract in ("batch", "lists")

    def values(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The checked values of rows: all at once where the function takes a batch, else of one row. Raises Faulty."""
        if not self.batched:
            return [self._checked(self._call(rows), rows[0])]
        try:
            found = self._call(rows)
        except Faulty as error:
            raise self._in_one_row(rows) or error from None
        if not isinstance(found, list | tuple) or len(found) != len(rows):
            came = f"{len(found)} values" if isinstance(found, list | tuple) else type(found).__name__
            raise Faulty(f"wanted a list with a value for each of the {len(rows)} rows, came {came}", _id(rows[0]))
        return [self._checked(value, row) for value, row in zip(found, rows, strict=True)]

    def _call(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        row = rows[0]
        arguments: dict[Contract, tuple[Any, ...]] = {
            "row": (row,),
            "sequential": (row,),
            "single": (row["response"], row["ground_truth"]),
            "batch": (list(rows),),
            "lists": ([one["response"] for one in rows], [one["ground_truth"] for one in rows]),
        }
        try:
            return self.function(*arguments[self.contract], **self.kwargs)
        except Exception as error:
            raise Faulty(describe(error, self.file), _id(row)) from error

    def _in_one_row(self, rows: Sequence[Mapping[str, Any]]) -> Faulty | None:
        """The fault of the first row at which a batch function raises also when it is given that row alone."""
        for row in rows:
            try:
                self._call([row])
            except Faulty as error:
                return error
        return None

    def _checked(self, value: Any, row: Mapping[str, Any]) -> float | dict[str, float]:
        """A finite number, or a mapping of names to finite numbers, as plain floats."""
        if isinstance(value, Mapping):
            if not value:
                raise Faulty("returned a dict without parts", _id(row))
            if self.contract != "row" and OVERALL not in value:
                raise Faulty(f'wanted a dict with "overall", came the keys {", ".join(map(str, value))}', _id(row))
            return {str(name): _finite(part, f"the part {name!r}", row) for name, part in value.items()}
        if self.contract in ("batch", "sequential"):
            raise Faulty(f'wanted a dict with "overall", came {value!r:.80} ({type(value).__name__})', _id(row))
        return _finite(value, "the value", row)


def _finite(value: Any, name: str, row: Mapping[str, Any]) -> float:
    if not isinstance(value, numbers.Real):
        raise Faulty(f"{name} is {value!r:.80} ({type(value).__name__}); wanted a number", _id(row))
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond 1e308
        number = math.inf
    if not math.isfinite(number):
        raise Faulty(f"{name} is {number}; wanted a finite number", _id(row))
    return number


def _id(row: Mapping[str, Any]) -> str:
    return str(row["id"])


def describe(error: BaseException, file: Path) -> str:
    """Type and message of an exception, with the line of the user's file at which it came up."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"SyntaxError: {error.msg}, at line {error.lineno}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(file)]
    at = f", at line {own[-1].lineno}: {own[-1].line}" if own else ""
    return f"{type(error).__name__}: {str(error)[:500]}{at}"


def load(name: str, kwargs: Mapping[str, Any]) -> UserFunction:
    """The function or other callable that `path.py:function` names. Raises Faulty.

    Paths are relative to the working directory.
    """
    match = USER_TERM.fullmatch(name)
    assert match is not None, name  # the config was checked
    file = Path(match["file"]).expanduser().absolute()
    if not file.is_file():
        # Compared without folder and `.py`, which all of them share and which make every name look near.
        beside = [one.stem for one in file.parent.glob("*.py")]
        near = difflib.get_close_matches(file.stem, beside, n=1, cutoff=0.6)
        raise Faulty(f"there is no file {file}" + (f"; did you mean {file.parent / near[0]}.py?" if near else ""))
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # at the end: a neighbour called math.py must not hide the library's
    spec = importlib.util.spec_from_file_location(f"user_reward_{abs(hash(str(file)))}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Faulty(f"the file cannot be loaded: {describe(error, file)}") from error
    names = vars(module)
    function = names.get(match["function"])
    if not callable(function):
        there = [one for one, value in names.items() if callable(value)]
        raise Faulty(f"the file has no function {match['function']}{nearest(match['function'], there)}")
    contract = contract_of(function, str(names.get("REWARD_TYPE", "")), kwargs)
    return UserFunction(name, file, function, contract, dict(kwargs))


def contract_of(function: Callable[..., Any], reward_type: str, kwargs: Mapping[str, Any]) -> Contract:
    """How a function wants to be called, by the names of the parameters without default. Raises Faulty.

    `reward_type` is the constant REWARD_TYPE of EasyR1's newer files: batch or sequential.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise Faulty(f"its signature cannot be read; wanted {ACCEPTED}") from None
    by_name = [one.name for one in parameters if one.kind is not one.POSITIONAL_ONLY]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    unknown = [name for name in kwargs if name not in by_name and not takes_any]
    if unknown:
        raise Faulty(f"reward.kwargs gives it {', '.join(unknown)}, but it takes {', '.join(by_name)}")
    wanted = [
        one.name
        for one in parameters
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        if one.name not in kwargs
    ]
    match wanted:
        case ["reward_inputs"]:
            return "batch"
        case ["reward_input"]:
            return "sequential"
        case [_] if reward_type in ("batch", "sequential"):
            return "batch" if reward_type == "batch" else "sequential"
        case [_]:
            return "row"
        case [_, "ground_truth"]:
            return "single"
        case [_, "ground_truths"]:
            return "lists"
    asked = ", ".join(wanted) or "nothing"
    raise Faulty(f"it asks for ({asked}); wanted {ACCEPTED}. Further parameters get their values from reward.kwargs")


def serve(functions: Sequence[UserFunction], source: BinaryIO) -> Iterator[dict[str, Any]]:
    """The replies to the calls in `source`; the one that names an error is the last."""
    for line in source:
        call = json.loads(line)
        function, rows = functions[call["function"]], call["rows"]
        for part in [rows] if function.batched else [[row] for row in rows]:
            try:
                yield {"values": function.values(part)}
            except Faulty as error:
                yield {"error": {"what": str(error), "row": error.row}}
                return


def main() -> None:
    functions_asked, _, parent = sys.argv[1:]
    end_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["JAX_PLATFORMS"] = "cpu"
    source, sink = take_protocol()

    def write(message: dict[str, Any]) -> None:
        sink.write(json.dumps({**message, "cpu_s": time.process_time()}).encode() + b"\n")
        sink.flush()
        if os.fstat(2).st_size > MAX_ERROR_BYTES:  # a function that prints must not fill the disk
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)

    wanted: list[tuple[str, dict[str, Any]]] = json.loads(functions_asked)
    functions = []
    for number, (name, kwargs) in enumerate(wanted):
        try:
            functions.append(load(name, kwargs))
        except Faulty as error:
            write({"ready": False, "function": number, "error": {"what": str(error), "row": ""}})
            return
    write({"ready": True, "batched": [function.batched for function in functions]})
    for reply in serve(functions, source):
        write(reply)


if __name__ == "__main__":
    main()
