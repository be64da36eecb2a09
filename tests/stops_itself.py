"""A command that sends itself a signal at a chosen call: `python stops_itself.py PLACE CALL SIGNAL WORDS...`

PLACE is `module:name` or `module:class.name`, CALL the number of the call before which the signal comes (1 is the
first), SIGNAL a name as SIGTERM. `PLACE@text` counts the calls alone of which an argument holds the text, and
`PLACE>INNER` means the first call of INNER behind that call of PLACE. Where a run stops does not depend on how busy the
machine is.
"""

import functools
import importlib
import itertools
import os
import signal
import sys
from typing import Any

from rethinker_jax.main import main


def arrange(place: str, call: int, number: signal.Signals) -> None:
    outer, _, inner = place.partition(">")
    outer, _, text = outer.partition("@")
    module, _, path = outer.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(lambda found, part: vars(found)[part], owners, importlib.import_module(module))
    function, calls = vars(owner)[name], itertools.count(1)

    def wrapped(*values: Any, **options: Any) -> Any:
        if (not text or any(text in str(value) for value in values)) and next(calls) == call:
            if inner:
                arrange(inner, 1, number)
            else:
                os.kill(os.getpid(), number)
        return function(*values, **options)

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    arrange(sys.argv[1], int(sys.argv[2]), signal.Signals[sys.argv[3]])
    sys.exit(main(sys.argv[4:]))
