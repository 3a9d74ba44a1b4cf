"""What the diagnose study says, from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pma.studies.diagnose_judging import ALL_BUT_WEIGHTS, DIAGNOSIS, GROUPINGS, RATE_AND_STAGE
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, Verdict, most, sign_verdict

_COLUMNS = (
    "predicted by",
    "AUROC of “beats last”",
    "mean error, nats",
    "regret of the advice, median",
    "mean",
    "most",
)
_GOOD, _REGRET, _QUARTER = 0.9, 0.01, 0.25


def tell(results: dict[str, Any]) -> Told:
    """Tables by what was left out; a verdict on each aim."""
    rows, figures = results["rows"], results["figures"]
    runs = len({row["run"] for row in rows})
    places = len({row["place"] for row in rows})
    set_up = (
        f"{runs} runs: sizes, dense and mixtures of experts, learning rates; the forks that anneal them "
        f"count with them. {places} places at which windows end, from just after warmup to the end and "
        f"inside decays; {len(rows)} windows, {100 * results['negatives']:.0f}% of them worse than last. "
        "Gains are held-out loss of last less that of the merge, over the first "
        f"{results['loss_characters']} characters of each document. Predictions are from inner products of "
        "checkpoints and the training log alone, by constants fitted to runs of other groups: of other "
        "sizes, of the other architecture, of other learning rates. Intervals (95%) are over runs. The "
        "simpler predictors are quadratic in the logarithms of what they know."
    )
    tables = [
        Table(
            title=f"Left out: one {grouping} at a time",
            columns=(
                "predicted by",
                "AUROC of “beats last”",
                "mean error, nats",
                "regret of the advice, median",
                "mean",
                "most",
            ),
            rows=[_row(name, found) for name, found in figures[grouping].items()],
        )
        for grouping in GROUPINGS
    ]
    constants = results["constants"]["with_gradient"]
    notes = [
        f"Fitted to all runs, a nat that the loss fell costs {constants['drift']:.2f} nats (1 in theory); "
        f"one standard error of a predicted gain is {constants['error']:.3f} nats, and "
        f"{100 * constants['error_of_cost']:.0f}% of what drift costs.",
    ]
    return Told(
        set_up=set_up,
        tables=tables,
        findings=_findings(results),
        more="models of another scale, other optimizers, batches and data: the constants are of one recipe, "
        "and a run of another kind may need its own",
        notes=notes,
    )


def _row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    area = found["auroc"]
    value = "not defined" if area["value"] is None else shown(area, 3, signed=False)
    return (
        name,
        value,
        f"{found['mean_absolute_error']:.3f}",
        f"{found['regret_median']:.3f}",
        f"{found['regret_mean']:.3f}",
        f"{found['regret_most']:.3f}",
    )


def _findings(results: Mapping[str, Any]) -> list[Finding]:
    figures = results["figures"]
    findings = [
        Finding(
            claim="on held-out runs the diagnosis tells merges that beat last from those that do not (AUROC "
            f"above {_GOOD})",
            verdict=most([_above(figures[g][DIAGNOSIS]["auroc"], _GOOD) for g in GROUPINGS]),
            evidence=_by_grouping(figures, DIAGNOSIS, "auroc", signed=False),
        )
    ]
    for name in (RATE_AND_STAGE, ALL_BUT_WEIGHTS):
        findings.append(
            Finding(
                claim=f"better than {name} alone do",
                verdict=most([_above(figures[g][name]["auroc_lead"], 0.0) for g in GROUPINGS]),
                evidence="AUROC ahead by " + _by_grouping(figures, name, "auroc_lead", signed=True),
            )
        )
    medians = [figures[g][DIAGNOSIS]["regret_median"] for g in GROUPINGS]
    findings.append(
        Finding(
            claim=f"the window it advises is within {_REGRET} nats of the best one tried, in the median",
            verdict=Verdict.AGREES if max(medians) <= _REGRET else Verdict.DISAGREES,
            evidence=", ".join(f"{value:.3f} ({g})" for value, g in zip(medians, GROUPINGS, strict=True)),
        )
    )
    findings.append(
        Finding(
            claim="a quarter of the windows at least are worse than last, so that there is something to tell",
            verdict=Verdict.AGREES if results["negatives"] >= _QUARTER else Verdict.DISAGREES,
            evidence=f"{100 * results['negatives']:.0f}%",
        )
    )
    return findings


def _above(found: Mapping[str, float | None], least: float) -> Verdict:
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return Verdict.CANNOT_TELL
    return sign_verdict(low - least, high - least)


def _by_grouping(figures: Mapping[str, Any], name: str, figure: str, *, signed: bool) -> str:
    parts = []
    for grouping in GROUPINGS:
        found = figures[grouping][name][figure]
        value = "not defined" if found["value"] is None else shown(found, 3, signed=signed)
        parts.append(f"{value} ({grouping} left out)")
    return ", ".join(parts)
