"""Losses and rates by step from files: strict tables (CSV), and any log that `pma.logs` reads.

A table is read as it is or refused: a row that were passed over in silence, or a restart that were repaired,
would shift every sum behind it.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pma import logs
from pma.errors import FormatError, InputError, UsageError, printable
from pma.forecast.curves import Curve, curve_of
from pma.forecast.schedules import Schedule, from_pairs, whole_rising_steps
from pma.logs.curves import number, quantity_named

_LARGEST_BYTES = 64 * 2**20

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of a file: `steps_N` rise; `losses` and `rates` by step, each with the steps that have one."""

    path: Path
    steps_N: NDArray[np.int64]
    losses: Mapping[int, float]
    rates: Mapping[int, float]
    notes: tuple[str, ...] = ()

    def schedule(self, warmup_steps: int | None) -> Schedule:
        """The schedule of the rows that have a rate. Raises InputError where there is none."""
        if not self.rates:
            raise InputError(
                f"{self.path} has no learning rates; expected a column lr (or learning_rate), or --schedule "
                "with a file of step,lr"
            )
        where = str(self.path)
        return from_pairs(list(self.rates), list(self.rates.values()), warmup_steps=warmup_steps, where=where)

    def curve(self, schedule: Schedule) -> Curve:
        """The losses, as trained under `schedule`. Raises InputError where none can be used."""
        if not self.losses:
            raise InputError(f"{self.path} has no losses; expected columns step and loss")
        return curve_of(str(self.path), list(self.losses), list(self.losses.values()), schedule)


def read_table(path: Path) -> Table:
    """A CSV file with a column of steps and one of losses, rates, or both; or a training log or run.

    Raises InputError where a file cannot be used, with row and what was expected.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; expected a file with columns step, and loss or lr")
    if path.is_dir() or path.suffix != ".csv":
        return _from_log(path)
    columns, rows = _cells(path)
    # a step that is not there is no number, and is told with the others that are none
    steps = [np.nan if step is None else step for step in _numbers(path, rows, columns["step"])]
    steps_N = whole_rising_steps(steps, str(path))
    found = {}
    for quantity in ("loss", "learning_rate"):
        values = _numbers(path, rows, columns[quantity]) if quantity in columns else [None] * len(rows)
        pairs = zip(steps_N.tolist(), values, strict=True)
        found[quantity] = {step: value for step, value in pairs if value is not None}
    return Table(path=path, steps_N=steps_N, losses=found["loss"], rates=found["learning_rate"])


def _from_log(path: Path) -> Table:
    curves = logs.read(path)
    losses, rates = curves.series("loss"), curves.series("learning_rate")
    return Table(
        path=path,
        steps_N=curves.steps,
        losses=dict(zip(losses[0].tolist(), losses[1].tolist(), strict=True)),
        rates=dict(zip(rates[0].tolist(), rates[1].tolist(), strict=True)),
        notes=curves.notes,
    )


def _cells(path: Path) -> tuple[dict[str, int], list[list[str]]]:
    """Which column holds what, and the rows' cells."""
    if path.stat().st_size > _LARGEST_BYTES:
        raise InputError(
            f"{path} is larger than {_LARGEST_BYTES // 2**20} MiB; expected a table of a training log"
        )
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    try:
        lines = [row for row in csv.reader(text.splitlines(), delimiter=separator, strict=True) if row]
    except csv.Error as error:
        raise FormatError(f"{path} is no table: {printable(str(error))}") from error
    if not lines:
        raise InputError(f"{path} is empty; expected a line step,lr,loss and rows of numbers")
    columns: dict[str, int] = {}
    for index, name in enumerate(lines[0]):
        quantity = quantity_named(name)
        if quantity in columns:
            raise UsageError(
                f"{path} has two columns of {quantity}: {printable(lines[0][columns[quantity]], 60)} and "
                f"{printable(name, 60)}; leave one out"
            )
        if quantity is not None:
            columns[quantity] = index
    if "step" not in columns or not columns.keys() & {"loss", "learning_rate"}:
        raise FormatError(
            f"{path}: the first line is {printable(','.join(lines[0]), 100)}; expected the names of "
            "columns, step and loss or lr among them"
        )
    for at, row in enumerate(lines[1:], start=1):
        if len(row) != len(lines[0]):
            raise FormatError(
                f"{path}: row {at} has {len(row)} cells; expected {len(lines[0])} as in the first line"
            )
    return columns, lines[1:]


def _numbers(path: Path, rows: list[list[str]], column: int) -> list[float | None]:
    """The cells of a column; an empty one is None."""
    values: list[float | None] = []
    for at, row in enumerate(rows, start=1):
        cell = row[column].strip()
        value = number(cell) if cell else None
        if cell and value is None:
            raise FormatError(f"{path}: row {at} has {printable(cell, 40)!r}; expected a number")
        values.append(value)
    return values
