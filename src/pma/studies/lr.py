"""What the paper left open: does a higher learning rate give better merges?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pma.studies import charts
from pma.studies.cases import Case, loss_characters, measured
from pma.studies.fig5 import Shape
from pma.studies.lab import VALIDATION, Lab
from pma.studies.making import Trunk
from pma.studies.measuring import Measured
from pma.studies.optimum import Values, optima_ratio, optimum
from pma.studies.presets import DENSE, Preset, Size
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, most, sign_verdict
from pma.studies.tuning import anneal, trunk, tuned

VERSION = 1
RAW, MERGED, ANNEALED = "raw", "merged", "annealed"
KINDS = (RAW, MERGED, ANNEALED)


def shapes(preset: Preset) -> list[Shape]:
    """Windows to choose from."""
    every = preset.every_steps
    tried = [Shape(every=every * times, last=preset.last) for times in (1, 2, 4, 8)]
    tried.append(Shape(every=every, last=2 * preset.last))
    return [shape for shape in tried if shape.exists(preset.steps, preset)]


def run(lab: Lab) -> dict[str, Any]:
    """Each rate of the middle sizes: the same seeds, the same tokens."""
    preset = lab.preset
    sizes = [preset.size(name) for name in preset.middle]
    chosen = tuned(lab, tuple(sizes))
    runs = {(size.name, rate): _runs(lab, size, rate) for size in sizes for rate in _rates(size, preset)}
    lab.make({anneal(lab, run) for by_seed in runs.values() for run in by_seed})
    wanted = {key: _models(lab, by_seed) for key, by_seed in runs.items()}
    validation = {
        key: {name: charts.mean_of(case.values(name), "loss") for name in case.readings}
        for key, case in measured(lab, wanted, where=VALIDATION).items()
    }
    best = {key: _best_window(losses) for key, losses in validation.items()}
    cases = measured(
        lab,
        {
            key: {RAW: models[RAW], ANNEALED: models[ANNEALED], MERGED: models[best[key]]}
            for key, models in wanted.items()
        },
    )
    return {
        "loss_characters": loss_characters(preset),
        "windows": [shape.name for shape in shapes(preset)],
        "sizes": [
            {
                "size": size.name,
                "tuned": chosen[size.name].rate,
                **_of_size(
                    {rate: cases[size.name, rate] for rate in _rates(size, preset)},
                    {rate: validation[size.name, rate] for rate in _rates(size, preset)},
                ),
            }
            for size in sizes
        ],
    }


def _rates(size: Size, preset: Preset) -> list[float]:
    """Beyond the rates that a size is tuned over, dense models are trained at the extra ones."""
    return sorted({*size.rates, *(preset.extra_rates if size.family == DENSE else ())})


def _runs(lab: Lab, size: Size, rate: float) -> list[Trunk]:
    return [trunk(lab, size, rate, seed) for seed in lab.seeds]


def _models(lab: Lab, runs: list[Trunk]) -> dict[str, list[Measured]]:
    """At the end: raw, annealed, and the merge of each window."""
    preset = lab.preset
    merges = {
        shape.name: [Measured(run=run, at=preset.steps, last=shape.last, every=shape.every) for run in runs]
        for shape in shapes(preset)
    }
    return {
        RAW: [Measured(run=run, at=preset.steps) for run in runs],
        ANNEALED: [Measured(run=anneal(lab, run), at=preset.steps) for run in runs],
        **merges,
    }


def _best_window(losses: Mapping[str, float]) -> str:
    return min((name for name in losses if name not in KINDS), key=lambda name: losses[name])


def _of_size(cases: Mapping[float, Case], validation: Mapping[float, Mapping[str, float]]) -> dict[str, Any]:
    """`cases`: of held-out text, `validation`: losses to choose by, both by rate in rising order."""
    rates = list(cases)
    windows = {rate: _best_window(validation[rate]) for rate in rates}
    chosen = {
        RAW: min(rates, key=lambda rate: validation[rate][RAW]),
        MERGED: min(rates, key=lambda rate: validation[rate][windows[rate]]),
        ANNEALED: min(rates, key=lambda rate: validation[rate][ANNEALED]),
    }
    every = Case(
        readings={_at(kind, rate): cases[rate].readings[kind] for rate in rates for kind in KINDS},
    )
    best = {kind: _at(kind, chosen[kind]) for kind in KINDS}
    nats = {kind: _nats([cases[rate] for rate in rates], kind) for kind in KINDS}
    tokens = cases[rates[0]].readings[RAW][0].text.tokens
    return {
        "rates": [
            {
                "rate": rate,
                "window": windows[rate],
                "validation_losses": dict(validation[rate]),
                "losses": {kind: [each["loss"] for each in cases[rate].values(kind)] for kind in KINDS},
                "gain": cases[rate].gain(RAW, MERGED),
                "merged_over_annealed": cases[rate].gain(ANNEALED, MERGED),
            }
            for rate in rates
        ],
        "chosen": chosen,
        "growth": [
            every.gain_beyond((_at(RAW, high), _at(MERGED, high)), (_at(RAW, low), _at(MERGED, low)))
            for low, high in pairwise(rates)
        ],
        "optimum": {kind: optimum(rates, nats[kind], tokens).to_json() for kind in KINDS},
        "ratio": {
            other: optima_ratio(rates, nats[MERGED], nats[other], tokens).to_json()
            for other in (RAW, ANNEALED)
        },
        "best_merged_over_best": {other: every.gain(best[other], best[MERGED]) for other in (RAW, ANNEALED)},
        "best_merged_over_tuned": every.gain(_at(MERGED, chosen[ANNEALED]), best[MERGED]),
    }


def _at(kind: str, rate: float) -> str:
    return f"{kind} {rate:g}"


def _nats(cases: Sequence[Case], kind: str) -> Values:
    """Means over seeds, a row a rate, a column a document."""
    means = [np.mean([reading.text.nats for reading in case.readings[kind]], axis=0) for case in cases]
    return np.asarray(means, dtype=np.float64)


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    sizes = results["sizes"]
    return Told(
        set_up="Each size at constant rate, for as many tokens at each rate. At the end: the raw checkpoint; "
        "the plain average over the window that is best on validation text (of "
        f"{'; '.join(results['windows'])}); and the fork that ends there, annealed. Losses and gains in "
        f"nats a token, on the first {results['loss_characters']:,} characters of each held-out document; "
        "95% intervals over documents.",
        tables=[_table(sizes), _optima(sizes)],
        findings=[_higher(sizes), _grows(sizes), _as_good(sizes)],
        more="three seeds, and longer runs: the best rate for a raw checkpoint falls with length, that for a "
        "merge may not.",
    )


def _table(sizes: list[dict[str, Any]]) -> Table:
    rows = []
    for size in sizes:
        for each in size["rates"]:
            losses = {kind: sum(each["losses"][kind]) / len(each["losses"][kind]) for kind in KINDS}
            cells = [_marked(losses[kind], chosen=each["rate"] == size["chosen"][kind]) for kind in KINDS]
            gains = [shown(each[name]) for name in ("gain", "merged_over_annealed")]
            rows.append([size["size"], f"{each['rate']:g}", *cells, each["window"], *gains])
    columns = ["size", "rate", *KINDS, "window", "merging gains", "merged over annealed"]
    title = "Held-out loss by learning rate; bold: the rate chosen on validation text."
    return Table(columns=columns, rows=rows, title=title)


def _marked(loss: float, *, chosen: bool) -> str:
    return f"**{loss:.4f}**" if chosen else f"{loss:.4f}"


def _optima(sizes: list[dict[str, Any]]) -> Table:
    """Between the rates tried."""
    rows = [
        [
            size["size"],
            *(_rate(size["optimum"][kind]) for kind in KINDS),
            *(_rate(size["ratio"][other], digits=2) for other in (RAW, ANNEALED)),
        ]
        for size in sizes
    ]
    columns = ["size", *(f"best rate, {kind}" for kind in KINDS), "merged ÷ raw", "merged ÷ annealed"]
    title = (
        "Best rates by a parabola in log rate; an asterisk: at the edge of the rates tried, so it may lie "
        "beyond."
    )
    return Table(columns=columns, rows=rows, title=title)


def _rate(optimum: dict[str, Any], digits: int = 4) -> str:
    edge = "*" if optimum["at_the_edge"] else ""
    value, low, high = (f"{optimum[key]:.{digits}f}" for key in ("rate", "low", "high"))
    return f"{value}{edge} ({low} to {high})"


def _higher(sizes: list[dict[str, Any]]) -> Finding:
    ratios = [size["ratio"][ANNEALED] for size in sizes]
    gains = "; ".join(
        f"{size['size']} at {size['chosen'][MERGED]:g} over {size['chosen'][ANNEALED]:g} "
        f"{shown(size['best_merged_over_tuned'])}"
        for size in sizes
    )
    return Finding(
        claim="merges are best at a higher rate than annealed models",
        verdict=most([sign_verdict(ratio["low"] - 1, ratio["high"] - 1) for ratio in ratios]),
        evidence=f"The merge at its own best rate against the merge at the annealed model's: {gains}.",
    )


def _grows(sizes: list[dict[str, Any]]) -> Finding:
    growth = [each for size in sizes for each in size["growth"]]
    least, most_ = (pick(growth, key=lambda g: float(g["value"])) for pick in (min, max))
    return Finding(
        claim="the higher the rate, the more merging gains over raw",
        verdict=most([sign_verdict(each["low"], each["high"]) for each in growth]),
        evidence=f"From one rate to the next its gain grows by {shown(least)} to {shown(most_)}.",
    )


def _as_good(sizes: list[dict[str, Any]]) -> Finding:
    gains = [size["best_merged_over_best"][ANNEALED] for size in sizes]
    told = "; ".join(f"{size['size']} {shown(gain)}" for size, gain in zip(sizes, gains, strict=True))
    return Finding(
        claim="at their own best rates, the merge is better than the annealed model",
        verdict=most([sign_verdict(gain["low"], gain["high"]) for gain in gains]),
        evidence=f"Merged over annealed: {told}.",
    )


def draw(results: dict[str, Any]) -> Any:
    """A panel a size: held-out loss over the learning rate."""
    points = [
        {
            "panel": size["size"],
            "metric": "held-out loss (nats a token)",
            "x": each["rate"],
            "y": loss,
            "model": kind,
        }
        for size in results["sizes"]
        for each in size["rates"]
        for kind in KINDS
        for loss in each["losses"][kind]
    ]
    return charts.panels(points, x="peak learning rate", log_x=True, models=KINDS, width=340)
