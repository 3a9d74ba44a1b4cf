"""Training curves from the rows of any log: which column is which, steps that go back, values that are no
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pma.errors import FormatError, UsageError, printable

Quantity = Literal["loss", "grad_norm", "learning_rate"]
QUANTITIES: tuple[Quantity, ...] = ("loss", "grad_norm", "learning_rate")

# what trainers call them, the likelier first; case, signs and a leading group do not matter
_STEP = (
    *("step", "global_step", "iter", "iteration", "iterations", "current_steps", "current_step"),
    *("train_step", "trainer_global_step", "num_updates", "update"),
)
_NAMES: Mapping[Quantity, tuple[str, ...]] = {
    "loss": (
        *(
            "loss",
            "lm_loss",
            "ce_loss",
            "loss_step",
            "global_avg_loss",
            "cross_entropy_loss",
            "cross_entropy",
        ),
        *("nll_loss", "train_loss", "lm_loss_training_lm_loss"),
    ),
    "grad_norm": (
        *("grad_norm", "gradient_norm", "total_grad_norm", "global_grad_norm", "gnorm", "grad_norm_total"),
        "train_grad_norm",
    ),
    "learning_rate": (
        *("learning_rate", "lr", "lr_group_0", "learning_rate_group_0", "lr_adamw", "lr_adamw_pg1"),
        "train_lr",
    ),
}
_LEADING_GROUP = re.compile(r"(train|training|optim|loss_metrics)_")
_LONGEST_NUMBER = 64
_LARGEST_STEP = 2**63 - 1
_NAMED_IN_MESSAGES = 20
# entries this many usual distances apart are a gap worth telling
_GAP = 10

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingCurves:
    """What a run logged, by step; one entry where anything was logged.

    `steps` (int64, rising), `loss`, `grad_norm`, `learning_rate` (float64, NaN where absent), all of one
    length. A NaN that the trainer logged is told from absence by `logged`. `sources`: the files read;
    `notes`: what was repaired or left out, for people.
    """

    steps: NDArray[np.int64]
    loss: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    learning_rate: NDArray[np.float64]
    logged: Mapping[Quantity, NDArray[np.bool_]]
    sources: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def series(self, quantity: Quantity) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of the entries that have `quantity`, NaN and infinities among them."""
        there = self.logged[quantity]
        values: NDArray[np.float64] = getattr(self, quantity)
        return self.steps[there], values[there]


def collect(
    rows: Iterable[Row],
    sources: tuple[Path, ...],
    *,
    names: Mapping[str, str] | None = None,
    exact: bool = False,
) -> TrainingCurves:
    """The curves in `rows`, in the order they were written.

    `names`: columns by quantity (or "step") where the usual names do not tell; `exact`: quantities have these
    very names and no others. Where steps go back, the trainer was restarted: what it had logged from there on
    is left out, as the restarted run does not build on it.

    Raises FormatError where no row has both a step and a loss or gradient norm.
    """
    columns = _Columns(_checked(names or {}), exact=exact)
    for row in rows:
        columns.add(row)
    where = ", ".join(str(source) for source in sources)
    chosen = columns.chosen(where)
    table, notes = _by_step(columns.entries, chosen)
    notes = [*columns.notes(), *notes]
    steps = np.array(sorted(table), dtype=np.int64)
    return TrainingCurves(
        steps=steps,
        **{q: np.array([table[s].get(q, np.nan) for s in steps.tolist()]) for q in QUANTITIES},
        logged={q: np.array([q in table[s] for s in steps.tolist()], dtype=np.bool_) for q in QUANTITIES},
        sources=sources,
        notes=(*notes, *_gap_notes(steps)),
    )


def recognised(column_names: Iterable[str]) -> bool:
    """Whether columns of these names hold a training log: a step, and a loss or gradient norm."""
    plain = [_plain(name) for name in column_names]
    ranks = [_rank(name) for name in plain]
    return any(name in _STEP for name in plain) and any(
        r is not None and r[0] != "learning_rate" for r in ranks
    )


def quantity_named(column: str) -> Literal["step"] | Quantity | None:
    """What a column of this name holds by the usual names; None where they do not tell."""
    plain = _plain(column)
    if plain in _STEP:
        return "step"
    found = _rank(plain)
    return found[0] if found is not None else None


def number(value: object) -> float | None:
    """A logged value as a float, NaN and infinities included; None where it is no number."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str) and len(value) > _LONGEST_NUMBER:
        return None
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


class _Columns:
    """The entries of every column whose name is known: (step, name, value), in written order."""

    def __init__(self, names: Mapping[str, str], *, exact: bool) -> None:
        self._names = names
        self._exact = exact
        self._seen: dict[str, tuple[Quantity, int] | None] = {}
        self._step_name = names.get("step")
        self.entries: list[tuple[int, str, float]] = []
        self.stepless = 0
        self.strings = 0

    def add(self, row: Row) -> None:
        for name in row:
            if name not in self._seen:
                self._seen[name] = self._classified(name)
        mine = [(name, value) for name, value in row.items() if self._seen[name] is not None]
        values = [(name, number(value)) for name, value in mine if value is not None and value != ""]
        if not values:
            return
        step = _whole(self._step_of(row))
        if step is None:
            self.stepless += 1
            return
        self.strings += sum(value is None for _, value in values)
        self.entries.extend((step, name, value) for name, value in values if value is not None)

    def _classified(self, name: str) -> tuple[Quantity, int] | None:
        for quantity in QUANTITIES:
            if quantity in self._names:
                if self._names[quantity] == name:
                    return quantity, -1
            elif self._exact and name == quantity:
                return quantity, 0
        found = None if self._exact else _rank(_plain(name))
        return found if found is not None and found[0] not in self._names else None

    def _step_of(self, row: Row) -> object:
        if self._step_name is None or self._step_name not in row:
            if "step" in self._names:
                return None
            there = {_plain(name): name for name in row}
            found = next((there[name] for name in _STEP if name in there), None)
            if found is None:
                return None
            self._step_name = found
        return row[self._step_name]

    def chosen(self, where: str) -> dict[str, Quantity]:
        """For each quantity the column with the likeliest name that has values."""
        with_values = {name for _, name, _ in self.entries}
        best: dict[Quantity, tuple[int, str]] = {}
        for name in sorted(with_values):
            found = self._seen[name]
            assert found is not None
            best[found[0]] = min(best.get(found[0], (len(_STEP) + 99, "")), (found[1], name))
        for quantity in ("loss", "grad_norm"):
            if quantity in self._names and quantity not in best:
                raise UsageError(
                    f"{where} has no column {self._names[quantity]!r} with numbers and steps; {self._there()}"
                )
        if not best.keys() & {"loss", "grad_norm"}:
            raise FormatError(
                f"{where} holds no training log: expected rows with a step and a loss or gradient norm, such "
                f"as step and loss; {self._there()}. Name the columns where they are called otherwise "
                "(--step-name, --loss-name, --grad-norm-name)"
            )
        return {name: quantity for quantity, (_, name) in best.items()}

    def _there(self) -> str:
        shown = ", ".join(printable(name, 60) for name in list(self._seen)[:_NAMED_IN_MESSAGES])
        more = ", …" if len(self._seen) > _NAMED_IN_MESSAGES else ""
        return f"there are {shown}{more}" if shown else "it is empty"

    def notes(self) -> list[str]:
        notes = []
        if self.stepless:
            notes.append(f"{self.stepless} rows without a whole number as step were left out")
        if self.strings:
            notes.append(f"{self.strings} values that are no numbers were left out")
        return notes


def _checked(names: Mapping[str, str]) -> Mapping[str, str]:
    unknown = set(names) - {"step", *QUANTITIES}
    if unknown:
        raise UsageError(
            f"{sorted(unknown)[0]!r} is no quantity of a log; there are step, {', '.join(QUANTITIES)}"
        )
    return names


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(name)[:200].lower()).strip("_")


def _rank(plain: str) -> tuple[Quantity, int] | None:
    short = _LEADING_GROUP.sub("", plain, count=1) if _LEADING_GROUP.match(plain) else plain
    for quantity, known in _NAMES.items():
        if short in known:
            # the bare name wins over the same name in a group
            return quantity, 2 * known.index(short) + (short != plain)
    return None


def _whole(value: object) -> int | None:
    found = number(value)
    if found is None or not found.is_integer() or not 0 <= found <= _LARGEST_STEP:
        return None
    return value if isinstance(value, int) and value <= _LARGEST_STEP else int(found)


def _by_step(
    entries: Iterable[tuple[int, str, float]], chosen: Mapping[str, Quantity]
) -> tuple[dict[int, dict[Quantity, float]], list[str]]:
    """Values by step, of the lineage that was written last; and what was left out for it."""
    table: dict[int, dict[Quantity, float]] = {}
    order: list[int] = []  # the steps of `table`, rising
    again = 0
    restarts: list[str] = []
    for step, name, value in entries:
        quantity = chosen.get(name)
        if quantity is None:
            continue
        if order and step < order[-1]:
            restarts.append(f"from {order[-1]} to {step}")
            while order and order[-1] >= step:
                del table[order.pop()]
        if not order or order[-1] != step:
            order.append(step)
            table[step] = {}
        again += quantity in table[step]
        table[step][quantity] = value
    notes = []
    if restarts:
        shown = ", ".join(restarts[:3]) + (", …" if len(restarts) > 3 else "")
        notes.append(
            f"steps go back {len(restarts)} times ({shown}), as after a restart; what had been "
            "logged from there on is left out"
        )
    if again:
        notes.append(f"{again} steps were logged twice; the later written values are taken")
    return table, notes


def _gap_notes(steps: NDArray[np.int64]) -> list[str]:
    if len(steps) < 3:
        return []
    distances = np.diff(steps)
    usual = float(np.median(distances))
    gaps = np.flatnonzero(distances > _GAP * usual)
    if not len(gaps):
        return []
    first, many = int(gaps[0]), "" if len(gaps) == 1 else "s"
    between = f"{int(steps[first])} and {int(steps[first + 1])}"
    return [f"{len(gaps)} gap{many} without entries, the first between steps {between}"]
