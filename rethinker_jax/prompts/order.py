"""The order in which rows are met: a function of (seed, epoch, place), the same for any number of hosts."""

import grain


class DataOrder:
    """`order[i]` is the row met in i-th place, for any i ≥ 0; every epoch is a fresh permutation of all rows."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True):
        if num_rows < 1:
            raise ValueError(f"wanted at least one row to order, came {num_rows}")
        rows = grain.MapDataset.range(num_rows).seed(seed)
        self._rows = (rows.shuffle() if shuffle else rows).repeat()

    def __getitem__(self, place: int) -> int:
        row = self._rows[place]
        assert row is not None  # grain's maps may filter; this one does not
        return row
