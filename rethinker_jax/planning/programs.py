"""Lowered programs → what the compiler says of them: peak memory, or that they do not fit, and their collectives."""

import dataclasses
import re
import time
from typing import Any

import jax

from rethinker_jax.errors import UserError
from rethinker_jax.planning.hlo import Collective, find_collectives

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_CAUSE = re.compile(r"\w*(Error|Exception): ")
_NEEDED = re.compile(r"total memory required[^(]*\(([\d.]+)([KMGT]?)B?\)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """peak_bytes: most bytes of a device while the program runs, its arguments included; `fits` is the compiler's word.

    said: why it does not fit, in the compiler's words. executable: None where it does not fit.
    """

    peak_bytes: int
    argument_bytes: int
    fits: bool
    said: str
    collectives: tuple[Collective, ...]
    seconds: float
    executable: Any

    @property
    def beside_arguments(self) -> int:
        """Bytes that come on top of what is there before it runs."""
        return max(0, self.peak_bytes - self.argument_bytes)


def compile_program(what: str, lowered: Any, num_devices: int, turns: int = 1) -> Compiled:
    """`turns`: of loops whose number of turns the program does not name.

    Raises UserError where the compiler does not take the program, for another reason than the main memory.
    """
    began = time.monotonic()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition("\n")[0]
        needed = _NEEDED.search(said)
        if "RESOURCE_EXHAUSTED" not in said:
            why = next((line for line in str(error).splitlines() if _CAUSE.match(line)), said)
            raise UserError(
                f"plan: the compiler does not take the {what} ({why}); a run on this mesh would end the same. Take "
                "another --mesh, or model.attention=plain if it is the attention."
            ) from error
        if needed is None:
            raise UserError(f"plan: the compiler has no room, and not in the main memory: {said}") from error
        size = int(float(needed.group(1)) * _UNITS[needed.group(2)])
        return Compiled(size, 0, False, said, (), time.monotonic() - began, None)
    seconds = time.monotonic() - began
    memory: Any = executable.memory_analysis()
    found = tuple(find_collectives(executable.as_text(), num_devices, turns))
    return Compiled(memory.peak_memory_in_bytes, memory.argument_size_in_bytes, True, "", found, seconds, executable)
