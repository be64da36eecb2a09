"""One line of a file of JSON lines."""

import json
from collections.abc import Mapping
from typing import Any


def object_of(line: bytes | str) -> dict[str, Any]:
    """The JSON object of one line. Raises ValueError where it is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({type(error).__name__})") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is wanted, not {type(row).__name__}")
    return row


def with_keys(line: bytes, added: Mapping[str, Any]) -> bytes:
    """The line of a JSON object with keys added, its end included.

    They stand behind the line's own bytes, which stay as they are. Where it has one of the keys already the line is
    written anew, in ASCII: text of models may hold halves of characters, which no file could.
    """
    row = json.loads(line.decode("utf-8-sig"))
    if added.keys() & row.keys():
        return json.dumps({**row, **added}).encode("ascii") + b"\n"
    body = line.rstrip().removesuffix(b"}").rstrip()
    return body + (b", " if row else b"") + json.dumps(added).encode("ascii")[1:] + b"\n"
