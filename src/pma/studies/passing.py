"""How often continuations pass the place of a collapse: counts, paired differences, verdicts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pma.studies.seeds import of_values, shown
from pma.studies.telling import Finding, Table, Verdict, sign_verdict

STARTS = ("merge", "rollback", "further rollback")
DATA = ("same data", "data skipped")
COMPARED = {
    "held_steps_past_the_collapse": "steps held past the collapse",
    "tail": "training loss at the end",
    "held_out": "held-out loss at the end",
}
RETURNED = 0.1  # nats above its best at which a run is back


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often each passed; merge less rollback, paired by seed."""
    mine = [row for row in rows if "arms" in row]
    collapsed = sum(row["collapse_step"] is not None for row in rows)
    told: dict[str, Any] = {"seeds": len(rows), "collapsed": collapsed, "went_on": len(mine)}
    told["alarm_after_collapse"] = [row["found"]["seen_step"] - row["collapse_step"] for row in mine]
    for data in DATA:
        arms = {start: [row["arms"][f"{start}, {data}"] for row in mine] for start in STARTS}
        told[data] = {
            "passed": {start: sum(arm["passed"] for arm in arms[start]) for start in STARTS},
            "above_best": _interval(
                [
                    arm["tail"] - row["best"]
                    for arm, row in zip(arms["merge"], mine, strict=True)
                    if arm["passed"] and arm["tail"] is not None
                ]
            ),
        }
        for other in STARTS[1:]:
            told[data][f"merge less {other}"] = _compared(arms["merge"], arms[other])
    return told


def _compared(merges: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    both = list(zip(merges, others, strict=True))
    only_merge = sum(a["passed"] and not b["passed"] for a, b in both)
    only_other = sum(b["passed"] and not a["passed"] for a, b in both)
    told: dict[str, Any] = {"passed_by_merge_only": only_merge, "passed_by_other_only": only_other}
    told["p"] = sign_test(only_merge, only_merge + only_other)
    for key in COMPARED:
        pairs = [(a[key], b[key]) for a, b in both]
        told[key] = _interval([a - b for a, b in pairs if a is not None and b is not None])
    return told


def _interval(values: list[float]) -> dict[str, Any] | None:
    """Mean and 95% interval over seeds, and the median; None of fewer than two."""
    if len(values) < 2:
        return None
    return {**of_values(values).to_json(), "median": float(np.median(values))}


def sign_test(successes: int, trials: int) -> float:
    """Two-sided p of so many successes if each were as likely as not."""
    from scipy.stats import binomtest

    return float(binomtest(successes, trials).pvalue) if trials else 1.0


def share(successes: int, trials: int) -> tuple[float, float]:
    """The exact 95% interval (Clopper and Pearson) of a share."""
    from scipy.stats import binomtest

    if not trials:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(0.95)
    return float(interval.low), float(interval.high)


def _most(successes: int, trials: int) -> tuple[Verdict, str]:
    """Of a claim that it is so more often than not."""
    low, high = share(successes, trials)
    return sign_verdict(low - 0.5, high - 0.5), f"{successes} of {trials} ({low:.0%} to {high:.0%})"


def findings(results: dict[str, Any]) -> list[Finding]:
    """The claim in its parts."""
    told = results["summary"]
    if not told["went_on"]:
        return [
            Finding(
                claim="training passes the place of a collapse when resumed from the merge before it",
                verdict=Verdict.CANNOT_TELL,
                evidence=f"Of {told['seeds']} runs {told['collapsed'] or 'none'} collapsed"
                + (
                    "."
                    if not told["collapsed"]
                    else ", and none was found in time with three checkpoints before it."
                ),
            )
        ]
    made = []
    for data in DATA:
        verdict, evidence = _most(told[data]["passed"]["merge"], told["went_on"])
        claim = f"resumed from the merge, training passes the place more often than not ({data})"
        made.append(Finding(claim=claim, verdict=verdict, evidence=f"It did in {evidence}."))
    for data in DATA:
        pair = told[data]["merge less rollback"]
        only, other = pair["passed_by_merge_only"], pair["passed_by_other_only"]
        verdict, evidence = _most(only, only + other)
        made.append(
            Finding(
                claim=f"where just one of merge and rollback passes, it is the merge ({data})",
                verdict=verdict,
                evidence=f"It was in {evidence}; sign test p = {pair['p']:.2g}.",
            )
        )
    return [*made, *(_returned(data, told[data]["above_best"]) for data in DATA)]


def _returned(data: str, above: dict[str, Any] | None) -> Finding:
    claim = f"merges that passed return to within {RETURNED:g} nats of the run's best loss ({data})"
    if above is None:
        return Finding(claim=claim, verdict=Verdict.CANNOT_TELL, evidence="Fewer than two passed.")
    low, high = above["low"] - RETURNED, above["high"] - RETURNED
    nearest = min(above["by_seed"])
    return Finding(
        claim=claim,
        verdict=sign_verdict(low, high, claimed_positive=False),
        evidence=f"At the end they were {shown(above, 2)} nats above it, the nearest {nearest:.2f}.",
    )


def tables(told: dict[str, Any]) -> list[Table]:
    """How often each passed, and the paired differences."""
    went_on = told["went_on"]
    passed = Table(
        title=f"Of {told['seeds']} runs {told['collapsed']} collapsed. {_alarms(told)} Passed, of {went_on}:",
        columns=["", *STARTS],
        rows=[[data, *(str(told[data]["passed"][start]) for start in STARTS)] for data in DATA],
    )
    if not went_on:
        return [passed]
    rows = [
        [name, *(_shown(told[data]["merge less rollback"][key]) for data in DATA)]
        for key, name in COMPARED.items()
    ]
    title = "Merge less rollback, paired by seed, 95% interval:"
    return [passed, Table(title=title, columns=["", *DATA], rows=rows)]


def _alarms(told: dict[str, Any]) -> str:
    late = told["alarm_after_collapse"]
    if not late:
        return ""
    return (
        f"`pma spikes` found {len(late)} of them from what was logged until 20 steps later, "
        f"{max(late)} steps after the collapse at the latest and {-min(late)} before it at the earliest."
    )


def _shown(interval: dict[str, Any] | None) -> str:
    return "" if interval is None else shown(interval, 2)
