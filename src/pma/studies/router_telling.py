"""The write-up and figure of `router`."""

from __future__ import annotations

from typing import Any

from pma.studies import charts
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, Verdict, most, sign_verdict

ENTROPY_MARGIN, HEAVIEST_MARGIN = 0.01, 0.1
_PAIRS = {
    "last merge": "merge and last",
    "last neighbour": "last and the checkpoint before it",
    "last earlier": "last and the checkpoint a window earlier",
    "annealed merge": "merge and annealed",
    "annealed last": "last and annealed",
}


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    points = [point for model in results["models"] for point in model["points"]]
    window, every = results["last"] * results["every_steps"], results["every_steps"]
    changes = [point["change"] for point in points]
    findings = [
        _more(
            points,
            "earlier",
            f"the merge routes tokens like last, more so than last's own past {window} steps earlier",
        ),
        _more(points, "neighbour", f"and more so than last's neighbour {every} steps earlier"),
        _more(points, "annealed", "the merge's routing is nearer the annealed model's than last's is"),
        Finding(
            claim=f"merging keeps load balance (normalised entropy within ±{ENTROPY_MARGIN}, the heaviest "
            f"load within ±{HEAVIEST_MARGIN:.0%} of last's)",
            verdict=most(
                [_within(change["entropy"], ENTROPY_MARGIN) for change in changes]
                + [_within(change["heaviest"], HEAVIEST_MARGIN) for change in changes]
            ),
            evidence="Entropy changes by "
            + _range([change["entropy"]["value"] for change in changes], "+.4f")
            + ", the heaviest load by "
            + _range([change["heaviest"]["value"] for change in changes], "+.1%")
            + ".",
        ),
        Finding(
            claim="merging makes loads more even (entropy)",
            verdict=most([sign_verdict(c["entropy"]["low"], c["entropy"]["high"]) for c in changes]),
            evidence=f"More even at {sum(c['entropy']['low'] > 0 for c in changes)}, less even at "
            f"{sum(c['entropy']['high'] < 0 for c in changes)} of {len(changes)} points.",
        ),
    ]
    return Told(
        set_up=_set_up(results),
        tables=[_table(results)],
        findings=findings,
        more="several seeds, more experts and layers, and how routing changes with the length of the window.",
    )


def _set_up(results: dict[str, Any]) -> str:
    top, experts = results["top"], results["experts"]
    return (
        f"Mixtures of experts ({top} of {experts} active) at their tuned constant rates, at three points "
        f"in training: last, the merge of the last {results['last']} checkpoints "
        f"({results['every_steps']} steps apart), earlier checkpoints, and at the end an annealed model "
        f"with as many tokens. All read the same {results['tokens']:,} held-out tokens; agreement is the "
        "share of a token's experts that both models choose, by layer, each in its own stream of "
        f"activations ({top / experts:.0%} by chance). 95% intervals over documents, of balance by "
        "jackknife."
    )


def _more(points: list[dict[str, Any]], name: str, claim: str) -> Finding:
    found = [point["more_than"][name] for point in points if name in point["more_than"]]
    values = [each["value"] for each in found]
    return Finding(
        claim=claim,
        verdict=most([sign_verdict(each["low"], each["high"]) for each in found]),
        evidence=f"Agreement differs by {_range(values, '+.3f')} over {len(found)} comparisons.",
    )


def _within(interval: dict[str, float], margin: float) -> Verdict:
    if -margin <= interval["low"] and interval["high"] <= margin:
        return Verdict.AGREES
    outside = interval["low"] > margin or interval["high"] < -margin
    return Verdict.DISAGREES if outside else Verdict.CANNOT_TELL


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}".replace("-", "−")


def _table(results: dict[str, Any]) -> Table:
    rows = []
    for model in results["models"]:
        for point in model["points"]:
            balance = point["balance"]
            rows.append(
                [
                    model["size"],
                    f"{point['step']:,}",
                    shown(point["gain"], 4),
                    *(_agreed(point, pair) for pair in _PAIRS),
                    " → ".join(f"{balance[each]['entropy_L']:.4f}" for each in ("last", "merge")),
                    " → ".join(f"{balance[each]['heaviest_L']:.2f}" for each in ("last", "merge")),
                ]
            )
    columns = ["size", "step", "loss gained", *_PAIRS.values(), "entropy of loads", "heaviest / mean load"]
    return Table(columns=columns, rows=rows, title="Agreement of top-k choices; loads of last → merge:")


def _agreed(point: dict[str, Any], pair: str) -> str:
    found = point["agreement"].get(pair)
    return "" if found is None else f"{found['value']:.3f} ± {found['high'] - found['value']:.3f}"


def draw(results: dict[str, Any]) -> Any:
    """A column a size: agreement of pairs above, evenness of loads below, over training."""
    points = []
    names = {"last": "raw", "merge": "merged", "annealed": "annealed"}
    for model in results["models"]:
        for point in model["points"]:
            common = {"panel": model["size"], "x": point["step"] * results["tokens_a_step"]}
            for pair, found in point["agreement"].items():
                metric = "agreement of top-k choices"
                points.append({**common, "metric": metric, "y": found["value"], "model": _PAIRS[pair]})
            for name, shown_as in names.items():
                if name in point["balance"]:
                    y = point["balance"][name]["entropy_L"]
                    points.append({**common, "metric": "entropy of loads", "y": y, "model": shown_as})
    models = [*_PAIRS.values(), *names.values()]
    return charts.panels(points, x="training tokens", models=models)
