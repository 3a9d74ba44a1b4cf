"""Figure 3: from a fork, go on at constant rate and merge, or anneal."""

from __future__ import annotations

from typing import Any

from pma.studies import charts
from pma.studies.cases import MARGIN, Case, loss_characters, measured
from pma.studies.lab import Lab
from pma.studies.making import Trunk
from pma.studies.measuring import Measured
from pma.studies.presets import Preset
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, Verdict, most, sign_verdict
from pma.studies.tuning import anneal, trunks

VERSION = 1
POINTS = (0, 0.2, 0.5, 1)  # where both ways are measured, of the decay's length
RAW, MERGED, ANNEALED = "raw", "merged", "annealed"
LAST, MERGED_AT_FORK = "last", "merged at the fork"
_POINT = 0.01


def run(lab: Lab) -> dict[str, Any]:
    """Both ways from each fork of the middle sizes."""
    preset = lab.preset
    runs = {name: tuple(trunks(lab, preset.size(name)).values()) for name in preset.middle}
    wanted = {
        (name, fork, after): _models(lab, runs[name], fork, after)
        for name in runs
        for fork in preset.fork_steps
        for after in _points(preset)
    }
    lab.make({model.run for models in wanted.values() for model in models[ANNEALED]})
    cases = measured(lab, wanted)
    end = preset.anneal_steps
    scored = measured(lab, {key: models for key, models in wanted.items() if key[2] == end}, scored=True)
    return {
        "loss_characters": loss_characters(preset),
        "last": preset.last,
        "every_steps": preset.every_steps,
        "anneal_steps": preset.anneal_steps,
        "tokens_a_step": preset.sizes[0].recipe.tokens_a_step,
        "forks": [
            {
                "size": name,
                "fork_step": fork,
                **_of_fork(
                    {after: cases[name, fork, after] for after in _points(preset)}, scored[name, fork, end]
                ),
            }
            for name in runs
            for fork in preset.fork_steps
        ],
    }


def _points(preset: Preset) -> list[int]:
    """Steps after a fork at which there are checkpoints."""
    return sorted({round(preset.anneal_steps * x / preset.every_steps) * preset.every_steps for x in POINTS})


def _models(lab: Lab, runs: tuple[Trunk, ...], fork: int, after: int) -> dict[str, list[Measured]]:
    preset, at = lab.preset, fork + after
    return {
        RAW: [Measured(run=run, at=at) for run in runs],
        MERGED: [Measured(run=run, at=at, last=preset.last, every=preset.every_steps) for run in runs],
        ANNEALED: [Measured(run=anneal(lab, run, fork), at=at) for run in runs],
    }


def _of_fork(cases: dict[int, Case], scored: Case) -> dict[str, Any]:
    """`cases` by steps after the fork; `scored` at the end."""
    start, end = cases[0], cases[max(cases)]
    both = end.with_models(start, {LAST: RAW, MERGED_AT_FORK: MERGED})
    possible = (LAST, ANNEALED)
    return {
        "points": [
            {
                "after_steps": after,
                **{model: case.values(model) for model in (RAW, MERGED, ANNEALED)},
                "merged_over_raw": case.gain(RAW, MERGED),
                "merged_over_annealed": case.gain(ANNEALED, MERGED),
            }
            for after, case in cases.items()
        ],
        "annealed_over_last": both.gain(*possible),
        "recovered": {
            MERGED_AT_FORK: both.share((LAST, MERGED_AT_FORK), possible),
            RAW: both.share((LAST, RAW), possible),
            MERGED: both.share((LAST, MERGED), possible),
        },
        "of_the_gain_over_raw": end.share((RAW, MERGED), (RAW, ANNEALED)),
        "scores": {model: scored.values(model) for model in (RAW, MERGED, ANNEALED)},
        "merged_over_annealed": {"loss": end.gain(ANNEALED, MERGED), **scored.gains(ANNEALED, MERGED)},
        "merged_over_raw": {"loss": end.gain(RAW, MERGED), **scored.gains(RAW, MERGED)},
    }


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    forks = results["forks"]
    scores = [name for name in forks[0]["merged_over_annealed"] if name != "loss"]
    last, every, steps = results["last"], results["every_steps"], results["anneal_steps"]
    return Told(
        set_up=f"From each fork, {steps} more steps of the same data at the constant rate (raw; and the "
        f"plain average of the last {last} checkpoints, {every} steps apart), or with a cosine decay. "
        f"Losses on the first {results['loss_characters']:,} characters of each held-out document; the same "
        "documents and items for all; 95% intervals over seeds and over documents or items.",
        tables=[_recovered(forks), _distances(forks, scores)],
        findings=[*_early(forks), _loss_at_the_end(forks), *(_score(forks, name) for name in scores)],
        more="longer decays, and tasks that these models do clearly better than by chance.",
    )


def _recovered(forks: list[dict[str, Any]]) -> Table:
    title = (
        "Gain recovered, (last − x) / (last − annealed), where last is the raw checkpoint at the fork; the "
        "last two columns' models were trained for as many tokens as the annealed one:"
    )
    rows = []
    for fork in forks:
        shares = [_share(fork["recovered"][name]) for name in (MERGED_AT_FORK, RAW, MERGED)]
        rows.append([fork["size"], f"{fork['fork_step']:,}", shown(fork["annealed_over_last"]), *shares])
    columns = ["size", "fork", "last − annealed (nats)", "merge at the fork", "raw", "merge"]
    return Table(columns=columns, rows=rows, title=title)


def _share(interval: dict[str, Any] | None) -> str:
    return "undefined" if interval is None else shown(interval, 2, signed=False)


def _distances(forks: list[dict[str, Any]], scores: list[str]) -> Table:
    title = (
        "The merge against the annealed model after as many tokens, positive where the merge is better; and "
        "its share of what annealing gains over raw:"
    )
    rows = []
    for fork in forks:
        distances = [shown(fork["merged_over_annealed"][name]) for name in ("loss", *scores)]
        share = _share(fork["of_the_gain_over_raw"])
        rows.append([fork["size"], f"{fork['fork_step']:,}", *distances, share])
    columns = ["size", "fork", "loss (nats a token)", *scores, "share of the gain in loss"]
    return Table(columns=columns, rows=rows, title=title)


def _early(forks: list[dict[str, Any]]) -> list[Finding]:
    """On the first point after the fork."""
    first = [fork["points"][1] for fork in forks]
    findings = []
    for other, name in (("merged_over_raw", "the raw model"), ("merged_over_annealed", "the annealing one")):
        gains = [point[other] for point in first]
        findings.append(
            Finding(
                claim=f"{first[0]['after_steps']} steps after each fork, merging at constant rate beats "
                f"{name} in loss",
                verdict=most([sign_verdict(gain["low"], gain["high"]) for gain in gains]),
                evidence=f"By {_range(gains)} nats a token.",
            )
        )
    return findings


def _loss_at_the_end(forks: list[dict[str, Any]]) -> Finding:
    shares = [fork["of_the_gain_over_raw"] for fork in forks]
    known = [share for share in shares if share is not None]
    least = 1 - MARGIN
    verdicts = [sign_verdict(share["low"] - least, share["high"] - least) for share in known]
    evidence = f"Merging gains {_range(known, 2)} of it." if known else "Annealing gained nothing over raw."
    return Finding(
        claim="at the end, merging stays comparable to annealing in loss (it has at least "
        f"{least:.0%} of what annealing gains over raw at equal tokens)",
        verdict=most([*verdicts, *[Verdict.CANNOT_TELL] * (len(shares) - len(known))]),
        evidence=evidence,
    )


def _score(forks: list[dict[str, Any]], name: str) -> Finding:
    """A score may be lower than the annealed model's by no more than a point."""
    gains = [fork["merged_over_annealed"][name] for fork in forks]
    return Finding(
        claim=f"at the end, merging stays comparable to annealing in {name} (at most a point below)",
        verdict=most([sign_verdict(gain["low"] + _POINT, gain["high"] + _POINT) for gain in gains]),
        evidence=f"Merging is above annealing by {_range(gains)}.",
    )


def _range(intervals: list[dict[str, Any]], digits: int = 3) -> str:
    """From the least to the greatest, each with its interval."""
    ordered = sorted(intervals, key=lambda interval: float(interval["value"]))
    signed = digits > 2
    return " … ".join(shown(each, digits, signed=signed) for each in (ordered[0], ordered[-1]))


def draw(results: dict[str, Any]) -> Any:
    """A row a size, a column a fork: held-out loss over training tokens on the ways from it."""
    points = [
        {
            "panel": f"fork at step {fork['fork_step']:,}",
            "metric": f"held-out loss, {fork['size']}",
            "x": (fork["fork_step"] + point["after_steps"]) * results["tokens_a_step"],
            "y": values["loss"],
            "model": model,
        }
        for fork in results["forks"]
        for point in fork["points"]
        for model in (RAW, MERGED, ANNEALED)
        for values in point[model]
    ]
    return charts.panels(points, x="training tokens", models=(RAW, MERGED, ANNEALED))
