"""The collectives of a compiled program, read from its text: what is sent, how often, among whom.

A collective in the body of a loop runs once a turn. XLA's text of a program for TPUs does not say how many turns a loop
makes, so they are taken from its structure: the loop's condition compares a counter with a constant, and the body adds
a constant to it. Every loop that `lax.scan`, `lax.map` and XLA's own pipelined products make is of this kind, and its
counter begins at 0. Of a loop that is not (`while_loop` of the sampler) the caller says how many turns it makes.
What stands in a branch of a condition is counted as if it were always taken.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program. bytes: that each device sends, once. count: how often, over all loops around it.

    group: devices that take part together, by their numbers in the mesh, the first such group. loops: turns of the
    loops around it, outermost first; None = not in the text, told by the caller. name: of the operation that it serves.
    """

    kind: str
    bytes: int
    count: int
    group: tuple[int, ...]
    loops: tuple[int | None, ...]
    shape: str
    name: str

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.count


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    result: str  # its shape
    operands: tuple[str, ...]
    line: str
    is_root: bool


Program = dict[str, list[_Instruction]]


def read_program(text: str) -> tuple[Program, str]:
    """(instructions of every computation, name of the one where the program begins)."""
    program: Program = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header.group(2)
            program[current] = []
            entry = current if header.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            program[current].append(_read_instruction(found.group(2), found.group(3), bool(found.group(1))))
    return program, entry


def _read_instruction(name: str, rest: str, is_root: bool) -> _Instruction:
    start = _after_shape(rest)
    opcode = _OPCODE.search(rest, start)
    if opcode is None:
        return _Instruction(name, "", rest, (), rest, is_root)
    end = rest.find(")", opcode.end())
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[opcode.end() : end]))
    return _Instruction(name, opcode.group(1), rest[: opcode.start()], operands, rest, is_root)


def _after_shape(rest: str) -> int:
    """Where the shape ends: that of a tuple holds parentheses."""
    if not rest.startswith("("):
        return 0
    depth = 0
    for place, sign in enumerate(rest):
        depth += (sign == "(") - (sign == ")")
        if not depth:
            return place
    return 0


def find_collectives(text: str, num_devices: int, turns: int = 1) -> list[Collective]:
    """Every collective that the program runs. `turns`: of loops whose number of turns is not in the text."""
    program, entry = read_program(text)
    found: list[Collective] = []

    def visit(name: str, loops: tuple[int | None, ...]) -> None:
        for one in program.get(name, ()):
            kind = next((kind for kind in KINDS if one.opcode in (kind, f"{kind}-start")), None)
            if kind is not None:
                found.append(_read_collective(kind, one, loops, num_devices, turns))
            elif one.opcode == "send" and (crossing := _read_crossing(one, loops, num_devices, turns)):
                found.append(crossing)
            elif one.opcode == "while":
                body, condition = (_attribute(one.line, key) for key in ("body", "condition"))
                visit(body, (*loops, _num_turns(program, body, condition)))
            elif one.opcode in ("call", "conditional", "async-start"):
                for callee in _callees(one.line):
                    visit(callee, loops)

    visit(entry, ())
    return found


def _callees(line: str) -> list[str]:
    names = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        names += re.findall(r"%?([\w.\-]+)", branches)
    return names


def _attribute(line: str, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", line)
    return match.group(1) if match else ""


def _num_turns(program: Program, body: str, condition: str) -> int | None:
    """Turns of a loop that counts from 0 to a constant; None where it is no such loop."""
    limit = _limit(program, condition)
    if limit is None:
        return None
    counter, bound = limit
    instructions = {one.name: one for one in program.get(body, ())}
    root = next((one for one in instructions.values() if one.is_root and one.opcode == "tuple"), None)
    step = None
    if root is not None and counter < len(root.operands):
        step = _increment(program, instructions, root.operands[counter])
    return -(-bound // (step or 1))


def _limit(program: Program, condition: str) -> tuple[int, int] | None:
    """(place of the counter in the loop's state, bound) of `counter < bound`."""
    instructions = {one.name: one for one in program.get(condition, ())}
    compare = next((one for one in instructions.values() if "direction=LT" in one.line), None)
    if compare is None:  # it may stand in a fused computation, which is given the counter and, perhaps, the bound
        outer = next((one for one in instructions.values() if one.opcode in ("fusion", "call")), None)
        inner = program.get(next(iter(_callees(outer.line)), ""), []) if outer is not None else []
        if outer is None or not any("direction=LT" in one.line for one in inner):
            return None
        bounds = [_constant(one) for one in (*inner, *instructions.values())]
        operands = outer.operands
    else:
        operands = compare.operands
        bounds = [_constant(instructions[name]) for name in operands if name in instructions]
    places = [_place(instructions[name]) for name in operands if name in instructions]
    known = [bound for bound in bounds if bound is not None]
    counters = [place for place in places if place is not None]
    return (counters[0], known[0]) if len(known) == 1 and len(counters) == 1 else None


def _constant(one: _Instruction) -> int | None:
    match = re.search(r"\bconstant\((\d+)\)", one.line)
    return int(match.group(1)) if one.opcode == "constant" and match else None


def _place(one: _Instruction) -> int | None:
    match = re.search(r"\bindex=(\d+)", one.line)
    return int(match.group(1)) if one.opcode == "get-tuple-element" and match else None


def _increment(program: Program, instructions: dict[str, _Instruction], name: str) -> int | None:
    """The constant that is added to the counter: in the body, or in a fusion that makes the addition."""
    one = instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast") and one.operands:
        one = instructions.get(one.operands[0])
    if one is None:
        return None
    if one.opcode == "add":
        sums = [_constant(instructions[operand]) for operand in one.operands if operand in instructions]
    elif one.opcode == "fusion":
        sums = [_constant(inner) for inner in program.get(next(iter(_callees(one.line)), ""), ())]
        sums += [_constant(instructions[operand]) for operand in one.operands if operand in instructions]
    else:
        return None
    known = [value for value in sums if value]
    return known[0] if len(known) == 1 else None


def _read_collective(
    kind: str, one: _Instruction, loops: tuple[int | None, ...], num_devices: int, turns: int
) -> Collective:
    group = first_group(one.line, num_devices)
    n = len(group)
    arrays = array_bytes(one.result)
    size = sum(arrays)
    if one.opcode.endswith("-start"):
        if kind == "all-gather":  # (what goes in, what comes out), n times as large
            size = size * n // (n + 1)
        elif kind == "collective-permute":  # (what goes in, what comes out, two words)
            size = max(arrays, default=0)
    sent = {
        "all-gather": size * (n - 1) // n,
        "all-reduce": 2 * size * (n - 1) // n,
        "reduce-scatter": size * (n - 1),
        "all-to-all": size * (n - 1) // n,
    }.get(kind, size)
    metadata = re.search(r'op_name="([^"]*)"', one.line)
    count = math.prod(turns if loop is None else loop for loop in loops)
    return Collective(kind, sent, count, group, loops, one.result.strip(), metadata.group(1) if metadata else "")


def _read_crossing(one: _Instruction, loops: tuple[int | None, ...], num_devices: int, turns: int) -> Collective | None:
    """A collective between TPU slices, which the compiler leaves to the runtime and sends it the array; else None."""
    kind = re.search(r'_xla_megascale_transfer_type="([^"]*)"', one.line)
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', one.line)
    if kind is None or slices is None:
        return None
    n = len(_numbers(slices.group(1)))
    size = max(array_bytes(one.result), default=0)
    sent = 2 * size * (n - 1) // n if kind.group(1) == "ALL_REDUCE" else size
    # A slice's devices stand together in the mesh: the first of every slice.
    group = tuple(number * (num_devices // n) for number in range(n))
    count = math.prod(turns if loop is None else loop for loop in loops)
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', one.line)
    called = kind.group(1).lower().replace("_", "-")
    return Collective(called, sent, count, group, loops, one.result.strip(), name.group(1) if name else "")


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array of a shape, which may be a tuple."""
    found = []
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS[dtype] if dtype in _BITS else int(re.sub(r"\D.*", "", dtype[1:]))
        found.append(math.prod(int(size) for size in sizes.split(",") if size) * bits // 8)
    return found


def first_group(line: str, num_devices: int) -> tuple[int, ...]:
    """The group that device 0 is in, by its numbers in the mesh. No group named: all devices."""
    pairs = re.search(r"source_target_pairs=\{(\{[^=]*\})\}", line)
    if pairs:
        return _component([tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if mesh:
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))]
        return _along(axes, re.findall(r"'([^']+)'", mesh.group(2)))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        return _iota_group(*(_numbers(part) for part in iota.groups()))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return _numbers(listed.group(1)) if listed else tuple(range(num_devices))


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in (text or "").split(",") if number)


def _component(pairs: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The ring or chain that the first pair is part of."""
    next_of = {pair[0]: pair[1] for pair in pairs}
    chain = [pairs[0][0]] if pairs else [0]
    while chain[-1] in next_of and next_of[chain[-1]] not in chain:
        chain.append(next_of[chain[-1]])
    return tuple(chain)


def _along(axes: Sequence[tuple[str, int]], chosen: Iterable[str]) -> tuple[int, ...]:
    """Numbers of the devices that differ from device 0 along the chosen axes of a row-major mesh."""
    group, stride, wanted = [0], math.prod(size for _, size in axes), set(chosen)
    for name, size in axes:
        stride //= size
        if name in wanted:
            group = [start + step * stride for start in group for step in range(size)]
    return tuple(group)


def _iota_group(shape: tuple[int, ...], sizes: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """The first row of arange(prod(sizes)).reshape(sizes).transpose(order).reshape(shape)."""
    order = order or tuple(range(len(sizes)))
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    numbers = [0]
    for place in order:
        numbers = [start + step * strides[place] for start in numbers for step in range(sizes[place])]
    return tuple(numbers[: math.prod(shape[1:]) if len(shape) > 1 else shape[0]])
