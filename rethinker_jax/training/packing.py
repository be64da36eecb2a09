"""Which tokens stand where in the update: rows → groups → sequences → pieces in packed rows of one length.

A *group* is the rows of one prompt. Where there are several, their prompt is a *sequence* of its own, run once, and
each completion another, which goes on from the prompt's keys; a row alone is one sequence, prompt and completion.
Sequences see nothing of each other but that, so several lie in one packed row. One that no row has room for is cut, and
its second *piece* goes on from the keys of the first: whatever the lengths are, hardly any place is padding.

The forward pass is fed a completion without its last token, which predicts nothing, and behind a shared prompt with the
prompt's last token, which predicts the first one: so every prediction lies in the completion's own sequence.
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence

FILL = 0.99  # of the packed rows, that is aimed at
LEAST_HOLE = 0.01  # of a packed row: a smaller one is left empty
MOST_SKEW = 1.02  # of the fullest cell to the mean, above which groups are halved


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows with one prompt: their numbers, the tokens of the prompt, and of each row's completion (at least 1)."""

    rows: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """What the forward pass is fed."""
        return self.prompt_tokens - 1 + sum(self.completion_tokens)

    @property
    def num_pairs(self) -> int:
        """Pairs of tokens that see each other: every token sees itself and what it goes on from."""
        shared = self.shared_tokens
        if not shared:
            return sum(_causal_pairs(self.prompt_tokens - 1 + count) for count in self.completion_tokens)
        return _causal_pairs(shared) + sum(count * shared + _causal_pairs(count) for count in self.completion_tokens)

    @property
    def shared_tokens(self) -> int:
        """What a completion goes on from: all of the prompt but its last token, where the prompt is shared."""
        return self.prompt_tokens - 1 if len(self.rows) > 1 else 0

    def halves(self) -> tuple["Group", "Group"]:
        """Two groups of about half the completion tokens each; both have the prompt. Wants at least two rows."""
        sides: tuple[list[int], list[int]] = ([], [])
        loads = [0, 0]
        for place in sorted(range(len(self.rows)), key=lambda place: -self.completion_tokens[place]):
            lighter = int(loads[1] < loads[0])
            sides[lighter].append(place)
            loads[lighter] += self.completion_tokens[place]
        first, second = (
            Group(
                tuple(self.rows[place] for place in sorted(side)),
                self.prompt_tokens,
                tuple(self.completion_tokens[place] for place in sorted(side)),
            )
            for side in sides
        )
        return first, second


def _causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of tokens of one sequence. The sequence is a shared prompt (`row` None), or that of a row."""

    group: int  # place in the cell
    row: int | None
    first: int  # token of the sequence with which it begins
    num_tokens: int


@dataclasses.dataclass
class PackedRow:
    """Pieces side by side, and how many keys stand before them: those of `groups`' prompts and of earlier pieces."""

    pieces: list[Piece] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    groups: set[int] = dataclasses.field(default_factory=set)
    prefix_tokens: int = 0


def spread(groups: Sequence[Group], num_cells: int) -> list[list[Group]]:
    """The groups in cells of about equal numbers of tokens: largest first, each into the emptiest.

    Where groups are too few or too uneven for that, the largest of the fullest cell is halved: its prompt is run twice.
    """
    groups = list(groups)
    best = cells = _fill(groups, num_cells)
    for _ in range(sum(len(group.rows) for group in groups)):
        divisible = [group for group in max(cells, key=_load) if len(group.rows) > 1]
        if not divisible or max(map(_load, best)) * num_cells <= MOST_SKEW * sum(map(_load, best)):
            break
        largest = max(divisible, key=lambda group: group.num_tokens)
        groups = [other for other in groups if other is not largest] + list(largest.halves())
        cells = _fill(groups, num_cells)
        best = min(best, cells, key=lambda cells: max(map(_load, cells)))
    return best


def _load(cell: Sequence[Group]) -> int:
    return sum(group.num_tokens for group in cell)


def _fill(groups: Sequence[Group], num_cells: int) -> list[list[Group]]:
    cells: list[list[Group]] = [[] for _ in range(num_cells)]
    loads = [(0, cell) for cell in range(num_cells)]  # a heap; ties go to the first cell, as before
    for group in sorted(groups, key=lambda group: -group.num_tokens):
        load, emptiest = loads[0]
        cells[emptiest].append(group)
        heapq.heapreplace(loads, (load + group.num_tokens, emptiest))
    return cells


def sequences_of(cell: Sequence[Group]) -> list[Piece]:
    """The sequences of a cell, each in one piece."""
    found = []
    for place, group in enumerate(cell):
        if len(group.rows) == 1:
            found.append(Piece(place, group.rows[0], 0, group.num_tokens))
            continue
        if group.shared_tokens:
            found.append(Piece(place, None, 0, group.shared_tokens))
        pairs = zip(group.rows, group.completion_tokens, strict=True)
        found += [Piece(place, row, 0, count) for row, count in pairs]
    return found


def pack_cell(cell: Sequence[Group], row_tokens: int) -> list[PackedRow]:
    """The cell's sequences in about as few rows of `row_tokens` as hold them.

    The longest goes first, into the fullest row with room for it, of those whose prefix it does not lengthen if there
    is one. Where none has room, it is cut to fill the emptiest row, and the rest waits for its turn. How long the
    prefix of a row may grow is bounded, at no less than twice what one piece may need and a prompt more.
    """
    waiting = sorted(sequences_of(cell), key=lambda piece: piece.num_tokens)
    needs = [cell[piece.group].shared_tokens + piece.num_tokens for piece in waiting if piece.row is not None]
    longest = max(needs, default=0) + max((group.prompt_tokens for group in cell), default=0)
    limit = max(2 * longest, 4 * row_tokens)
    num_rows = math.ceil(sum(piece.num_tokens for piece in waiting) / (FILL * row_tokens))
    rows = [PackedRow() for _ in range(num_rows)]
    while waiting:
        piece = waiting.pop()
        row = _choose_row(cell, rows, piece, row_tokens, limit)
        if row is None:
            row = PackedRow()
            rows.append(row)
        count = min(piece.num_tokens, row_tokens - row.num_tokens)
        row.prefix_tokens += prefix_growth(cell, row, piece)
        if piece.row is not None and not piece.first:
            row.groups.add(piece.group)
        row.pieces.append(dataclasses.replace(piece, num_tokens=count))
        row.num_tokens += count
        if count < piece.num_tokens:
            waiting.append(dataclasses.replace(piece, first=piece.first + count, num_tokens=piece.num_tokens - count))
            waiting.sort(key=lambda piece: piece.num_tokens)
    return [row for row in rows if row.pieces]


def _choose_row(
    cell: Sequence[Group], rows: Sequence[PackedRow], piece: Piece, row_tokens: int, limit: int
) -> PackedRow | None:
    """A row for the piece, or for the first part of it; None where a new one is better."""
    open_rows = [
        row
        for row in rows
        if row_tokens - row.num_tokens > LEAST_HOLE * row_tokens
        and row.prefix_tokens + prefix_growth(cell, row, piece) <= limit
    ]
    enough = [row for row in open_rows if row.num_tokens + piece.num_tokens <= row_tokens]
    if enough:
        return min(enough, key=lambda row: (prefix_growth(cell, row, piece) > 0, -row.num_tokens))
    return min(open_rows, key=lambda row: (row.num_tokens, prefix_growth(cell, row, piece)), default=None)


def prefix_growth(cell: Sequence[Group], row: PackedRow, piece: Piece) -> int:
    """Keys that the piece would add before the row: a later piece brings a copy of all it goes on from."""
    shared = cell[piece.group].shared_tokens if piece.row is not None else 0
    if piece.first:
        return shared + piece.first
    return 0 if piece.group in row.groups else shared
