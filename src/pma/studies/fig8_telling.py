"""The write-up and figure of `fig8`."""

from __future__ import annotations

from typing import Any

from pma.reporting.charts import COLOURS, finished, require_altair
from pma.reporting.contour_chart import contour_ground
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, Verdict, most, sign_verdict

PLANES = {"three": "plane through three", "principal": "two principal directions"}
_WIDTH = 300


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    cases = [(model, name) for model in results["models"] for name in PLANES]
    lowest = [min(model[name]["gain_over"], key=lambda gain: gain["value"]) for model, name in cases]
    gains = [gain for model, name in cases for gain in model[name]["gain_over"]]
    last, every = results["last"], results["every_steps"]
    findings = [
        Finding(
            claim="the merge's held-out loss is below that of every checkpoint",
            verdict=most([sign_verdict(gain["low"], gain["high"]) for gain in gains]),
            evidence="Below the best of them by "
            + "; ".join(
                f"{shown(gain, 4)} ({model['size']}, {_number(model[name])})"
                for (model, name), gain in zip(cases, lowest, strict=True)
            )
            + " nats a token.",
        ),
        *(_nearer(results["models"], name, words) for name, words in PLANES.items()),
    ]
    return Told(
        set_up=f"The last {last} checkpoints of one dense model and one mixture, {every} steps apart, at "
        "their tuned constant rates. Two planes: through the first, the middle and the last of them; and "
        f"through their mean along the two directions in which all {last} vary most. The loss on the "
        f"planes is that of {results['grid_tokens']:,} tokens of validation text, coordinates are "
        "distances in the space of parameters, and the merge is the origin. Held-out losses on "
        f"{results['measure_tokens']:,} other tokens. Intervals (95%) over batches of documents, of "
        "distances by jackknife.",
        tables=[_table(cases)],
        findings=findings,
        more="several seeds, benchmark scores instead of losses (the paper draws MMLU), larger models.",
    )


def _minus(value: float) -> str:
    """Corrected by the jackknife, a distance near zero can fall below it."""
    return f"{value:.2f}".replace("-", "−")


def _nearer(models: list[dict[str, Any]], name: str, words: str) -> Finding:
    found = [model[name]["nearer"] for model in models]
    verdicts = [
        Verdict.CANNOT_TELL
        if each is None
        else sign_verdict(each["than_nearest"]["low"], each["than_nearest"]["high"])
        for each in found
    ]
    said = [
        f"{model['size']}: the minimum is outside what was drawn"
        if each is None
        else f"{model['size']}: {_minus(each['merge']['value'])} from it, the nearest checkpoint "
        f"{each['nearest']['value']:.2f}, difference {shown(each['than_nearest'], 2)}"
        for model, each in zip(models, found, strict=True)
    ]
    return Finding(
        claim=f"{words}: the merge is nearer the minimum than every checkpoint",
        verdict=most(verdicts),
        evidence="; ".join(said) + ".",
    )


def _number(plane: dict[str, Any]) -> str:
    return f"{len(plane['steps'])} checkpoints"


def _table(cases: list[tuple[dict[str, Any], str]]) -> Table:
    rows = []
    for model, name in cases:
        plane = model[name]
        gains = [gain["value"] for gain in plane["gain_over"]]
        best = "outside" if plane["minimum"] is None else _place(plane["minimum"])
        shares = plane.get("variance_shares")
        rows.append(
            [
                model["size"],
                PLANES[name],
                f"{plane['merge_loss']['value']:.4f}",
                f"{min(gains):+.4f} to {max(gains):+.4f}".replace("-", "−"),
                shown(plane["annealed_over_merge"], 4),
                best,
                _place(plane["annealed"]) + f", {plane['annealed_distance']:.2g} off the plane",
                "" if shares is None else f"{sum(shares):.0%}",
            ]
        )
    columns = ["model", "plane", "merge's loss", "checkpoints − merge", "merge − annealed", "minimum at"]
    return Table(columns=[*columns, "annealed model at", "variance in the plane"], rows=rows)


def _place(at: list[float]) -> str:
    return f"({at[0]:.2g}, {at[1]:.2g})".replace("-", "−")


def draw(results: dict[str, Any]) -> Any:
    """A row a model, a column a plane: bands of equal loss, checkpoints, merge, annealed model, minimum."""
    alt = require_altair()
    rows = [
        alt.hconcat(
            *(_panel(alt, model[name], f"{model['size']}, {words}") for name, words in PLANES.items())
        ).resolve_scale(color="independent")
        for model in results["models"]
    ]
    return finished(alt.vconcat(*rows).resolve_scale(color="independent"))


def _panel(alt: Any, plane: dict[str, Any], title: str) -> Any:
    titles = ("distance along the first axis", "along the second")
    ground = contour_ground(alt, plane["x"], plane["y"], plane["loss"], titles=titles)
    return (ground + _marks(alt, plane)).properties(width=_WIDTH, height=_WIDTH, title=title)


def _marks(alt: Any, plane: dict[str, Any]) -> Any:
    places = [
        {"x": at[0], "y": at[1], "model": "raw", "step": step}
        for at, step in zip(plane["checkpoints"], plane["steps"], strict=True)
    ]
    path = alt.Chart(alt.Data(values=places)).mark_line(color=COLOURS["raw"], strokeWidth=1, opacity=0.6)
    single = [
        {"x": 0.0, "y": 0.0, "model": "merged"},
        {"x": plane["annealed"][0], "y": plane["annealed"][1], "model": "annealed (projected)"},
    ]
    if plane["minimum"] is not None:
        single.append({"x": plane["minimum"][0], "y": plane["minimum"][1], "model": "minimum of the plane"})
    names = ["raw", "merged", "annealed (projected)", "minimum of the plane"]
    shades = [COLOURS["raw"], COLOURS["merged"], COLOURS["annealed"], "#c2185b"]
    dots = (
        alt.Chart(alt.Data(values=places + single))
        .mark_point(filled=True, size=90, opacity=1, stroke="white", strokeWidth=1)
        .encode(
            x="x:Q",
            y="y:Q",
            shape=alt.Shape(
                "model:N",
                title=None,
                scale=alt.Scale(domain=names, range=["circle", "circle", "diamond", "cross"]),
                legend=alt.Legend(orient="top"),
            ),
            fill=alt.Fill("model:N", title=None, scale=alt.Scale(domain=names, range=shades)),
        )
    )
    return path.encode(x="x:Q", y="y:Q", order="step:Q") + dots
