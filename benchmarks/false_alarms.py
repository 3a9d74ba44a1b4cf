"""How often the detector of breakaways alarms on healthy curves, and which spikes put into them it finds.

    python benchmarks/false_alarms.py ../shared/data/loss_curves/*/*.csv demo/run -o OUT.json

Every argument is a log or a run, as `pma spikes` takes it; all are taken to be healthy. Alarms are counted at
the thresholds, and at two thirds and half of them, to show the margin. For the recall a rise of known height,
lasting 1, 8 or 40 entries, is put in at random places, each in a copy of the curve; it counts as found if a
breakaway that the curve does not have by itself could be told from the past alone within 20 entries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.logs import read
from pma.logs.breakaways import THRESHOLDS, Breakaway, find
from pma.logs.curves import Quantity

RISES = (0.05, 0.1, 0.2, 0.5, 1.0)
LENGTHS = (1, 8, 40)
PLACES = 5
FIRST_JUDGED = 60  # the detector needs so many entries before it judges
WITHIN = 20
MARGINS = (1.0, 2 / 3, 0.5)


def recall(steps: NDArray[np.int64], values: NDArray[np.float64], random: np.random.Generator) -> list[Any]:
    """[rise, length, found] of every spike that was put in."""
    known = {b.first_step for b in find(steps, values, "loss")}
    rows = []
    for rise, length in itertools.product(RISES, LENGTHS):
        for _ in range(PLACES):
            at = int(random.integers(FIRST_JUDGED, len(values) - 1))
            spiked = values.copy()
            spiked[at : at + length] += rise
            last = min(at + WITHIN, len(values) - 1)
            found = find(steps[: last + 1], spiked[: last + 1], "loss")
            hit = any(b.first_step not in known and b.first_step >= steps[at - WITHIN] for b in found)
            rows.append([rise, length, hit])
    return rows


def alarms_by_margin(
    steps: NDArray[np.int64], values: NDArray[np.float64], quantity: Quantity
) -> list[list[Breakaway]]:
    """The alarms at each share of the thresholds."""
    limits = THRESHOLDS[quantity]
    lower = [replace(limits, single=limits.single * m, sustained=limits.sustained * m) for m in MARGINS]
    return [find(steps, values, quantity, limit) for limit in lower]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    curves, put_in = [], []
    for path in arguments.logs:
        log = read(path)
        for quantity in THRESHOLDS:
            steps, values = log.series(quantity)
            if len(values) <= FIRST_JUDGED:
                continue
            alarms, *closer = alarms_by_margin(steps, values, quantity)
            curves.append(
                {
                    "log": "/".join(path.parts[-2:]),
                    "quantity": quantity,
                    "entries": len(values),
                    "steps": int(steps[-1] - steps[0]),
                    "closer": [len(found) for found in closer],
                    "alarms": [[b.kind.value, b.first_step, round(b.size_mads, 1)] for b in alarms],
                }
            )
            if quantity == "loss":
                put_in += recall(steps, values, random)
    summary: dict[str, Any] = {"thresholds": {q: vars(t) for q, t in THRESHOLDS.items()}}
    for quantity in THRESHOLDS:
        mine = [c for c in curves if c["quantity"] == quantity]
        alarms = sum(len(c["alarms"]) for c in mine)
        entries, steps = (sum(c[key] for c in mine) for key in ("entries", "steps"))
        summary[quantity] = {"curves": len(mine), "entries": entries, "steps": steps, "alarms": alarms}
        summary[quantity]["alarms_at_two_thirds_and_half"] = [
            sum(c["closer"][i] for c in mine) for i in (0, 1)
        ]
        if entries:
            # no alarm in n is compatible with up to 3 / n, at 95%
            most = 3 if alarms == 0 else alarms + 2 * math.sqrt(alarms)
            summary[quantity] |= {
                "alarms_per_100k_entries": 1e5 * alarms / entries,
                "at_most_per_100k_entries": 1e5 * most / entries,
                "alarms_per_100k_steps": 1e5 * alarms / steps,
                "at_most_per_100k_steps": 1e5 * most / steps,
            }
    summary["recall"] = {
        f"{rise} nats, {length} entries": float(np.mean([r[2] for r in put_in if r[:2] == [rise, length]]))
        for rise, length in itertools.product(RISES, LENGTHS)
    }
    print(json.dumps(summary, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({**summary, "curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main()
