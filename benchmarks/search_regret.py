"""How much worse is what `pma sweep --search` finds within a budget than what it finds without one?

    python benchmarks/search_regret.py RUN… --budgets 1/2,1/4,1/6 -o benchmarks/results/search_regret.json

Of each run every candidate reads the half of the text that is chosen by; then the same search is run within
budgets that are shares of what a grid of all candidates reads. Both winners are compared on the other half.
Beside it, what as many readings of the whole half by candidates drawn at random would come to: the expected
loss of the best of them above the best of all, on the half that is chosen by.
"""

from __future__ import annotations

import argparse
import json
import resource
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from pma import sweeping, trajectory
from pma.engine import MergeOptions
from pma.evaluation import Document, read_documents
from pma.evaluation.evaluate import loss_difference
from pma.results import Store
from pma.sweeping import How, Outcome, Space

_PLENTY = 1e9


def main() -> None:
    given = _arguments()
    rows = []
    for run in given.runs:
        documents = [
            replace(document, text=document.text[: given.characters])
            for document in read_documents([run / "text" / "held_out.txt"])
        ]
        with Store(given.store) as store:
            rows.append(_measured(run, documents, given.budgets.split(","), store))
        print(json.dumps(rows[-1]["searches"], indent=1), flush=True)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "characters_a_document": given.characters,
        "seconds_of_one_core": spent.ru_utime + spent.ru_stime,
        "summary": _summary(rows),
        "runs": rows,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--budgets", default="1/2,1/4,1/6")
    parser.add_argument("--characters", type=int, default=1_000, help="of each document")
    parser.add_argument("--store", type=Path, default=Path("search_regret.sqlite"))
    parser.add_argument("-o", "--out", type=Path, default=Path("search_regret.json"))
    return parser.parse_args()


def _measured(run: Path, documents: list[Document], budgets: list[str], store: Store) -> dict[str, Any]:
    full = _searched(run, documents, _PLENTY, store)
    candidates = len(full.ranked)
    searches = {}
    for share in budgets:
        found = _searched(run, documents, float(Fraction(share)) * candidates, store)
        regret = loss_difference(found.reported["winner"], full.reported["winner"])
        searches[share] = {
            **_told(found),
            "regret": regret.value,
            "regret_standard_error": regret.standard_error,
        }
    tokens = sum(full.reported["last"].tokens), sum(full.selected["last"].tokens)
    losses = [ranked.loss for ranked in full.ranked]
    for search in searches.values():
        search["drawn_at_random"] = _drawn_at_random(losses, search["evaluations"], tokens[1] / sum(tokens))
    return {
        "run": run.name,
        "recipe": _recipe(run),
        "candidates": candidates,
        "tokens": {"report": tokens[0], "selection": tokens[1]},
        "full": _told(full),
        "searches": searches,
        "losses": [{"name": r.contender.words, "loss": r.loss} for r in full.ranked],
    }


def _drawn_at_random(losses: list[float], evaluations: float, half: float) -> dict[str, float]:
    """`losses`: of all candidates, rising. `half`: how much of the text is chosen by."""
    in_any_case = 2 + (1 - half)
    count = min(len(losses), int((evaluations - in_any_case) / half))
    # the best of those drawn is the one with this many better ones, none of which is drawn
    chances = [comb(len(losses) - 1 - better, count - 1) for better in range(len(losses))]
    expected = sum(c * loss for c, loss in zip(chances, losses, strict=True)) / comb(len(losses), count)
    return {"candidates": count, "expected_excess": expected - losses[0]}


def _recipe(run: Path) -> str:
    record = json.loads((run / "run.json").read_text())["recipe"]
    rate, seed = record["optimizer"]["learning_rate"], record["run"]["seed"]
    return f"{record['name']}, rate {rate:g}, seed {seed}"


def _searched(run: Path, documents: list[Document], budget: float, store: Store) -> Outcome:
    with sweeping.planner(MergeOptions(threads=1, memory_bytes=2**30)) as plans:
        field = sweeping.field(trajectory.resolve([run]), Space(), plans)
        return sweeping.search(field, plans, documents, budget, store, How())


def _told(outcome: Outcome) -> dict[str, Any]:
    found = sweeping.findings(outcome)
    return {
        "winner": found["winner"]["name"],
        "evaluations": found["evaluations"],
        "rungs": found["rungs"],
        "gain_over_last": found["winner"]["report"]["gain"]["value"],
        "below_plain": found["winner_below_plain"]["value"],
        "below_plain_standard_error": found["winner_below_plain"]["standard_error"],
        "flattered_by": found["flattered_by"]["value"],
        "flattered_beyond_plain": found["flattered_beyond_plain"]["value"],
        "plain_gain_over_last": found["plain"]["report"]["gain"]["value"],
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over runs with their standard errors, which are over runs."""
    of = {"full": [row["full"] for row in rows]}
    of |= {share: [row["searches"][share] for row in rows] for share in rows[0]["searches"]}
    return {
        name: {
            value: _mean([one[value] for one in found])
            for value in (
                "regret",
                "gain_over_last",
                "below_plain",
                "flattered_by",
                "flattered_beyond_plain",
                "evaluations",
            )
            if value in found[0]
        }
        | (
            {"drawn_at_random": _mean([one["drawn_at_random"]["expected_excess"] for one in found])}
            if "regret" in found[0]
            else {}
        )
        for name, found in of.items()
    }


def _mean(values: list[float]) -> dict[str, float]:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {
        "mean": float(np.mean(values)),
        "standard_error": error,
        "median": float(np.median(values)),
        "largest": max(values),
    }


if __name__ == "__main__":
    main()
