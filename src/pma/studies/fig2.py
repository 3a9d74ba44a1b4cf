"""Figure 2: averages during a cosine decay, against the end of it."""

from __future__ import annotations

from typing import Any

from pma.studies import charts
from pma.studies.cases import MARGIN, Case, loss_characters, measured
from pma.studies.lab import Lab
from pma.studies.making import Anneal
from pma.studies.measuring import Measured
from pma.studies.presets import Preset
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, Verdict, most, sign_verdict
from pma.studies.tuning import anneal, trunks

VERSION = 1
POINTS = (0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1)  # of the decay
EARLY = 0.25
RAW, START, END = "raw", "start", "end"


def run(lab: Lab) -> dict[str, Any]:
    """The last decay of the middle sizes; windows reach back into the stable phase where they have to."""
    preset = lab.preset
    windows = {f"merge of {last}": last for last in (max(2, preset.last // 2), preset.last)}
    decays = {
        name: [anneal(lab, run) for run in trunks(lab, preset.size(name)).values()] for name in preset.middle
    }
    wanted = {
        (name, after): _models(decays[name], preset, after, windows)
        for name in decays
        for after in _points(preset)
    }
    cases = measured(lab, wanted)
    return {
        "loss_characters": loss_characters(preset),
        "windows": windows,
        "every_steps": preset.every_steps,
        "decay_start_step": preset.fork_steps[-1],
        "decay_steps": preset.anneal_steps,
        "tokens_a_step": preset.sizes[0].recipe.tokens_a_step,
        "sizes": [
            {
                "size": name,
                "points": _of_size({after: cases[name, after] for after in _points(preset)}, windows),
            }
            for name in decays
        ],
    }


def _points(preset: Preset) -> list[int]:
    """Steps after the start of the decay at which there are checkpoints."""
    return sorted({round(preset.anneal_steps * x / preset.every_steps) * preset.every_steps for x in POINTS})


def _models(
    decays: list[Anneal], preset: Preset, after: int, windows: dict[str, int]
) -> dict[str, list[Measured]]:
    at = preset.fork_steps[-1] + after
    merges = {
        name: [Measured(run=run, at=at, last=last, every=preset.every_steps) for run in decays]
        for name, last in windows.items()
    }
    return {RAW: [Measured(run=run, at=at) for run in decays], **merges}


def _of_size(cases: dict[int, Case], windows: dict[str, int]) -> list[dict[str, Any]]:
    """At each point of the decay: losses, what merges gain over raw, and which share of the decay's gain a
    model has, counted from the raw checkpoint where the decay starts.
    """
    start, end = cases[0], cases[max(cases)]
    points = []
    for after, case in cases.items():
        all_models = case.with_models(start, {START: RAW, **{f"{START} {name}": name for name in windows}})
        all_models = all_models.with_models(end, {END: RAW})
        points.append(
            {
                "after_steps": after,
                "values": {name: case.values(name) for name in (RAW, *windows)},
                "gain": {name: case.gain(RAW, name) for name in windows},
                "share_of_the_decay": {
                    name: all_models.share((START, name), (START, END)) for name in (RAW, *windows)
                },
                "share_of_the_first_gain": {
                    name: all_models.share((RAW, name), (START, f"{START} {name}")) for name in windows
                },
            }
        )
    return points


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    sizes, windows = results["sizes"], list(results["windows"])
    points = sizes[0]["points"]
    early = max(1, _nearest(points, EARLY * results["decay_steps"]))
    return Told(
        set_up=f"The cosine decay of {results['decay_steps']} steps from step "
        f"{results['decay_start_step']:,}; at each point the raw checkpoint and plain averages of the last "
        f"{_listed(results)} checkpoints, {results['every_steps']} steps apart, which reach back into the "
        "stable phase while they have to. Losses on the first "
        f"{results['loss_characters']:,} characters of each held-out document; 95% intervals over seeds and "
        "documents.",
        tables=[_table(results, early)],
        findings=[
            *(_as_good(sizes, early, name) for name in windows),
            *(_vanishes(sizes, name) for name in windows),
        ],
        more="decays long enough that a window of ten checkpoints is a small part of them.",
    )


def _nearest(points: list[dict[str, Any]], step: float) -> int:
    return min(range(len(points)), key=lambda i: abs(float(points[i]["after_steps"]) - step))


def _listed(results: dict[str, Any]) -> str:
    return " and ".join(str(last) for last in results["windows"].values())


def _table(results: dict[str, Any], early: int) -> Table:
    """At the start, early, half-way, late and at the end."""
    windows, steps = list(results["windows"]), results["decay_steps"]
    rows = []
    for size in results["sizes"]:
        points = size["points"]
        picked = {0, early, _nearest(points, steps / 2), _nearest(points, 3 * steps / 4), len(points) - 1}
        for i in sorted(picked):
            point = points[i]
            rows.append(
                [
                    size["size"],
                    f"{point['after_steps'] / steps:.0%}",
                    f"{charts.mean_of(point['values'][RAW], 'loss'):.4f}",
                    *(shown(point["gain"][name]) for name in windows),
                    *(_share(point["share_of_the_decay"][name]) for name in (RAW, *windows)),
                ]
            )
    gains, shares = [f"gain, {name}" for name in windows], [f"share, {name}" for name in (RAW, *windows)]
    title = (
        "What merges gain over raw (nats a token), and how much of what the whole decay gains over its start "
        "each model has:"
    )
    return Table(columns=["size", "of the decay", "raw loss", *gains, *shares], rows=rows, title=title)


def _share(interval: dict[str, Any] | None) -> str:
    return "undefined" if interval is None else shown(interval, 2, signed=False)


def _as_good(sizes: list[dict[str, Any]], early: int, name: str) -> Finding:
    points = [size["points"][early] for size in sizes]
    shares = [point["share_of_the_decay"][name] for point in points]
    least = 1 - MARGIN
    verdicts = [
        Verdict.CANNOT_TELL if share is None else sign_verdict(share["low"] - least, share["high"] - least)
        for share in shares
    ]
    has = "; ".join(f"{size['size']} {_share(share)}" for size, share in zip(sizes, shares, strict=True))
    raw = "; ".join(_share(point["share_of_the_decay"][RAW]) for point in points)
    return Finding(
        claim=f"{points[0]['after_steps']} steps into the decay a {name} is about as good as its end (at "
        f"least {least:.0%} of what the decay gains)",
        verdict=most(verdicts),
        evidence=f"It has {has}; raw there {raw}.",
    )


def _vanishes(sizes: list[dict[str, Any]], name: str) -> Finding:
    """At the end: not above a tenth of what merging gained at the start."""
    ends = [size["points"][-1] for size in sizes]
    shares = [point["share_of_the_first_gain"][name] for point in ends]
    verdicts = [
        Verdict.CANNOT_TELL if share is None else sign_verdict(MARGIN - share["high"], MARGIN - share["low"])
        for share in shares
    ]
    gains = "; ".join(
        f"{size['size']} {shown(point['gain'][name])}" for size, point in zip(sizes, ends, strict=True)
    )
    return Finding(
        claim=f"the gain of a {name} vanishes as the rate does (at the end at most {MARGIN:.0%} of that at "
        "the start)",
        verdict=most(verdicts),
        evidence=f"At the end {gains} nats a token.",
    )


def draw(results: dict[str, Any]) -> Any:
    """A column a size: held-out loss of raw checkpoints and merges over the tokens of the decay."""
    models = {RAW: RAW, **{name: name for name in results["windows"]}}
    points = [
        {
            "panel": size["size"],
            "metric": "held-out loss (nats a token)",
            "x": (results["decay_start_step"] + point["after_steps"]) * results["tokens_a_step"],
            "y": values["loss"],
            "model": label,
        }
        for size in results["sizes"]
        for point in size["points"]
        for name, label in models.items()
        for values in point["values"][name]
    ]
    return charts.panels(points, x="training tokens", models=list(models.values()), width=340)
