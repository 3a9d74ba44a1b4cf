"""Figures 1 and 9: merging in the stable phase, for models of several sizes, at several points in
training.
"""

from __future__ import annotations

from typing import Any

from pma.studies import charts, seeds
from pma.studies.lab import Lab
from pma.studies.measuring import Measured, Reading
from pma.studies.presets import Size
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, most, sign_verdict
from pma.studies.tuning import trunks, tuned

POINTS = 4


def run(lab: Lab, family: str) -> dict[str, Any]:
    """Raw and merged models of each size of a family at four points in training."""
    sizes = lab.preset.of(family)
    rates = tuned(lab, sizes)
    preset = lab.preset
    first = preset.fork_steps[0]
    ends = [
        first + (preset.steps - first) * i // (POINTS - 1) // preset.every_steps * preset.every_steps
        for i in range(POINTS)
    ]
    return {
        "last": preset.last,
        "characters_a_document": _characters(lab),
        "every_steps": preset.every_steps,
        "tokens_a_step": sizes[0].recipe.tokens_a_step,
        "sizes": [_of_size(lab, size, ends, rates[size.name].rate) for size in sizes],
        "tuning": [row for name in rates for row in rates[name].rows],
    }


def _of_size(lab: Lab, size: Size, ends: list[int], rate: float) -> dict[str, Any]:
    runs = trunks(lab, size)
    preset = lab.preset
    wanted = [
        Measured(run=run, at=at, last=last, every=preset.every_steps)
        for at in ends
        for run in runs.values()
        for last in (1, preset.last)
    ]
    readings = iter(lab.measure(wanted, tasks=True, characters_a_document=_characters(lab)))
    points = []
    for at in ends:
        pairs = [(next(readings), next(readings)) for _ in runs]
        points.append({"step": at, **compared(pairs)})
    return {"size": size.name, "rate": rate, "points": points}


def _characters(lab: Lab) -> int:
    """Half of the usual text: there are many models, and documents count for more than their length."""
    return lab.preset.characters_a_document // 2


def compared(pairs: list[tuple[Reading, Reading]]) -> dict[str, Any]:
    """Raw and merged by seed, and what merging gains, with intervals."""
    texts = [(raw.text, merged.text) for raw, merged in pairs]
    told: dict[str, Any] = {
        "raw": [values(raw) for raw, _ in pairs],
        "merged": [values(merged) for _, merged in pairs],
        "gain": {"loss": seeds.loss_gain(texts).to_json(), "cloze": seeds.cloze_gain(texts).to_json()},
    }
    for task in pairs[0][0].tasks:
        both = [(raw.tasks[task], merged.tasks[task]) for raw, merged in pairs]
        told["gain"][task] = seeds.score_gain(both).to_json()
    return told


def values(reading: Reading) -> dict[str, float]:
    """A model's figures: loss, bits per byte, cloze, each task's score, and the plain mean of the scores."""
    scores = {"cloze": reading.text.cloze_accuracy or 0.0}
    scores |= {name: float(seeds.item_scores(result).mean()) for name, result in reading.tasks.items()}
    return {
        "loss": reading.text.loss.value,
        "bits_per_byte": reading.text.bits_per_byte,
        **scores,
        "mean_score": sum(scores.values()) / len(scores),
    }


def tell(results: dict[str, Any], kind: str) -> Told:
    """The write-up of either figure. `kind`: of which models, in words."""
    sizes = results["sizes"]
    losses = [[point["gain"]["loss"] for point in size["points"]] for size in sizes]
    scores = [name for name in sizes[0]["points"][0]["gain"] if name != "loss"]
    findings = [
        Finding(
            claim=f"merging lowers the held-out loss of {kind} of every size, at every point",
            verdict=most([sign_verdict(gain["low"], gain["high"]) for gains in losses for gain in gains]),
            evidence="At the end by " + _listed(sizes, "loss") + " nats a token.",
        ),
        *(
            Finding(
                claim=f"merging improves {name} of every size at the end",
                verdict=most([sign_verdict(*_ends(size, name)) for size in sizes]),
                evidence=f"By {_listed(sizes, name)}.",
            )
            for name in scores
        ),
    ]
    return Told(
        set_up=_set_up(results, kind),
        tables=[_table(results, scores), _tuning(results)],
        findings=findings,
        more="models that do more than chance on tasks such as HellaSwag and ARC, which take tens of "
        "millions of parameters (preset `gpu`).",
    )


def _set_up(results: dict[str, Any], kind: str) -> str:
    last, every = results["last"], results["every_steps"]
    return (
        f"{kind.capitalize()} at constant rate, each at the rate that gave the lowest loss after a cosine "
        "decay on validation text (last table, first seed). The raw checkpoint against the plain average of "
        f"the last {last}, {every} steps apart, on the same held-out documents (their first "
        f"{results['characters_a_document']:,} characters) and items. Gains are positive where the merge is "
        "better; 95% intervals over seeds and over documents or items."
    )


def _listed(sizes: list[dict[str, Any]], name: str) -> str:
    return "; ".join(f"{size['size']} {shown(size['points'][-1]['gain'][name])}" for size in sizes)


def _ends(size: dict[str, Any], name: str) -> tuple[float, float]:
    gain = size["points"][-1]["gain"][name]
    return gain["low"], gain["high"]


def _table(results: dict[str, Any], scores: list[str]) -> Table:
    rows = []
    for size in results["sizes"]:
        for point in size["points"]:
            raw, merged = (charts.mean_of(point[key], "loss") for key in ("raw", "merged"))
            gains = [shown(point["gain"][name]) for name in ("loss", *scores)]
            rows.append([size["size"], f"{point['step']:,}", f"{raw:.4f}", f"{merged:.4f}", *gains])
    names = [f"gain in {name}" for name in scores]
    return Table(columns=["size", "step", "raw loss", "merged loss", "gain in loss", *names], rows=rows)


def _tuning(results: dict[str, Any]) -> Table:
    chosen = {size["size"]: size["rate"] for size in results["sizes"]}
    rates = sorted({row["rate"] for row in results["tuning"]})
    by_size = {(row["size"], row["rate"]): row["annealed"] for row in results["tuning"]}
    rows = [
        [name, *(_marked(by_size.get((name, rate)), chosen=rate == best) for rate in rates)]
        for name, best in chosen.items()
    ]
    title = "Validation loss after the decay, by learning rate:"
    return Table(columns=["size", *(f"{rate:g}" for rate in rates)], rows=rows, title=title)


def _marked(loss: float | None, *, chosen: bool) -> str:
    text = "" if loss is None else f"{loss:.4f}"
    return f"**{text}**" if chosen else text


def draw(results: dict[str, Any]) -> Any:
    """Panels by size; above the held-out loss, below the mean score: raw and merged over training tokens."""
    points = []
    for metric, title in (("loss", "held-out loss (nats a token)"), ("mean_score", "mean score")):
        for size in results["sizes"]:
            for point in size["points"]:
                for kind in ("raw", "merged"):
                    points += [
                        {
                            "panel": size["size"],
                            "metric": title,
                            "x": point["step"] * results["tokens_a_step"],
                            "y": value[metric],
                            "model": kind,
                        }
                        for value in point[kind]
                    ]
    return charts.panels(points, x="training tokens")
