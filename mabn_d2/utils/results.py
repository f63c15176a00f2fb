"""Measurements in a CSV file that grows row by row."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .files import atomic_write


class Results:
    """
    The rows of a CSV file, which is whole at each moment. All values are strings.

    The columns `keys` tell one case from another; a case may have several rows. A row with an `error`
    stands for a case that failed.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        values: Sequence[str],
        origin: Sequence[str] = ("error", "device", "torch", "date"),
    ):
        """
        Args:
            path: of the file, which need not exist.
            origin: the last columns, which most files have in common.

        Raises:
            ValueError: the file has other columns.
        """
        self.path = path
        self.keys = tuple(keys)
        self.columns = (*keys, *values, *origin)
        self.load()

    def load(self) -> None:
        """Takes the rows from the file."""
        self.rows: list[dict[str, str]] = []
        if not self.path.exists():
            return
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ValueError(
                    f"{self.path} has the columns {', '.join(reader.fieldnames or ())}; expected "
                    f"{', '.join(self.columns)}"
                )
            self.rows = list(reader)

    def of(self, case: Mapping[str, str]) -> list[dict[str, str]]:
        """The rows of a case, which is given by its keys."""
        return [row for row in self.rows if all(row[key] == case[key] for key in self.keys)]

    def pending(self, cases: Iterable[dict[str, str]]) -> list[dict[str, str]]:
        """Those of the cases that have no rows, then those that failed."""
        rows = [(case, self.of(case)) for case in cases]
        return [case for case, found in rows if not found] + [
            case for case, found in rows if any(row["error"] for row in found)
        ]

    def forget(self, cases: Iterable[Mapping[str, str]]) -> None:
        """Removes the rows of the cases."""
        forgotten = [row for case in cases for row in self.of(case)]
        if forgotten:
            self._write([row for row in self.rows if row not in forgotten])

    def replace(self, case: Mapping[str, str], rows: Iterable[Mapping[str, str]]) -> None:
        """Writes the rows of a case, whose keys they need not repeat, in place of those it has."""
        before = self.of(case)
        kept = [row for row in self.rows if row not in before]
        empty = dict.fromkeys(self.columns, "")
        self._write(kept + [empty | dict(case) | dict(row) for row in rows])

    def _write(self, rows: list[dict[str, str]]) -> None:
        with atomic_write(str(self.path), "w") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self.rows = rows
