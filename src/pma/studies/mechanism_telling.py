"""The write-up and figure of `mechanism`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pma.reporting.charts import finished, require_altair
from pma.studies.seeds import shown
from pma.studies.telling import Finding, Table, Told, Verdict, most, sign_verdict

_SIZE_LOW, _SIZE_HIGH = 0.8, 1.25


def tell(results: dict[str, Any]) -> Told:
    """The write-up."""
    models = results["models"]
    return Told(
        set_up=_set_up(results),
        tables=[_matrices(models), _ranks(models)],
        findings=[*_of_the_paper(models), *_sharper(models)],
        notes=[_spectra(results)],
        more="several seeds, larger models, and optima that further training at a falling rate has found.",
    )


def _set_up(results: dict[str, Any]) -> str:
    last, every = results["last"], results["every_steps"]
    return (
        "One dense model and one mixture, at their tuned constant rates. Deviations δ of the last "
        f"{last} checkpoints ({every} steps apart) from what stands in for the optimum θ*: the model "
        f"that a decay gave, or their merge. Hessian-vector products on {results['predict_tokens']:,} "
        f"tokens of validation text, losses on {results['measure_tokens']:,} tokens of held-out text. "
        "About the merge itself Σδᵢ = 0, so the paper's inequality only says that the curvature along "
        "the deviations is positive on average, and it compares with the mean loss; so we also ask the "
        "sharper question, whether L(last) − L(merge) is gᵀδ + ½ δᵀHδ. Hessians of mixtures are those "
        "of the routing in force. Intervals (95%) are over batches of documents; of correlations and "
        "ratios over ends of windows: windows with one end share checkpoints."
    )


def _of_the_paper(models: list[dict[str, Any]]) -> list[Finding]:
    annealed = _around(models, "annealed")
    pairs = sum(m["pairs"] for m in annealed)
    negative = sum(m["negative_pairs"] for m in annealed)
    ratios = [m["gap_measured"]["value"] / m["gap_predicted"]["value"] for m in _all(models)]
    return [
        Finding(
            claim="the loss of the mean is below the mean of the losses",
            verdict=_signs(_all(models), "gap_measured"),
            evidence="By "
            + _each(models, lambda m: shown(_last(m, "merge")["gap_measured"], 4))
            + " nats at the end.",
        ),
        Finding(
            claim="Σ_(i≠j) δᵢᵀHδⱼ < (k − 1) Σ δᵢᵀHδᵢ",
            verdict=_signs(_all(models), "inequality"),
            evidence=f"Half of what is between them, over k², is the gap between mean loss and loss of the "
            f"mean to second order; measured over predicted it is {min(ratios):.2f} to {max(ratios):.2f}.",
        ),
        Finding(
            claim="about the annealed model the deviations complement each other: δᵢᵀHδⱼ is negative on "
            "average",
            verdict=_signs(annealed, "off_diagonal", positive=False),
            evidence=f"{negative} of {pairs} pairs are negative; mean off the diagonal over mean on it: "
            + _each(models, lambda m: _share(_last(m, "annealed")))
            + " at the end.",
        ),
    ]


def _sharper(models: list[dict[str, Any]]) -> list[Finding]:
    ranks = [model["telling"]["rank"]["predicted"] for model in models]
    ratios = [model["telling"]["ratio"] for model in models]
    return [
        Finding(
            claim="gᵀδ + ½ δᵀHδ at the merge ranks windows by L(last) − L(merge) on other text",
            verdict=most([sign_verdict(rank["low"], rank["high"]) for rank in ranks]),
            evidence="Spearman's rank correlation: "
            + _each(models, lambda m: shown(m["telling"]["rank"]["predicted"], 2))
            + f" over {len(models[0]['windows'])} windows each.",
        ),
        Finding(
            claim=f"and gives its size, to a factor between {_SIZE_LOW} and {_SIZE_HIGH}",
            verdict=most([_within(ratio["low"], ratio["high"]) for ratio in ratios]),
            evidence="Measured over predicted, sums over windows: "
            + _each(models, lambda m: shown(m["telling"]["ratio"], 2, signed=False))
            + ".",
        ),
    ]


def _within(low: float, high: float) -> Verdict:
    if low >= _SIZE_LOW and high <= _SIZE_HIGH:
        return Verdict.AGREES
    return Verdict.DISAGREES if high < _SIZE_LOW or low > _SIZE_HIGH else Verdict.CANNOT_TELL


def _signs(matrices: list[dict[str, Any]], name: str, *, positive: bool = True) -> Verdict:
    ends = [(m[name]["low"], m[name]["high"]) for m in matrices]
    return most([sign_verdict(*each, claimed_positive=positive) for each in ends])


def _all(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [matrix for model in models for matrix in model["matrices"]]


def _around(models: list[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    return [matrix for matrix in _all(models) if matrix["around"] == reference]


def _last(model: dict[str, Any], reference: str) -> dict[str, Any]:
    return _around([model], reference)[-1]


def _share(matrix: dict[str, Any]) -> str:
    return f"{matrix['off_diagonal']['value'] / matrix['diagonal']['value']:+.2f}".replace("-", "−")


def _each(models: list[dict[str, Any]], word: Callable[[dict[str, Any]], str]) -> str:
    return "; ".join(f"{model['size']} {word(model)}" for model in models)


def _matrices(models: list[dict[str, Any]]) -> Table:
    rows = [
        [
            model["size"],
            f"{m['step']:,}",
            m["around"],
            f"{m['negative_pairs']} of {m['pairs']}",
            _share(m),
            shown(m["gap_predicted"], 4),
            shown(m["gap_measured"], 4),
        ]
        for model in models
        for m in model["matrices"]
    ]
    columns = ["model", "step", "θ*", "negative pairs", "mean off / on the diagonal"]
    columns += ["mean loss − loss of mean, predicted", "measured"]
    return Table(columns=columns, rows=rows)


def _ranks(models: list[dict[str, Any]]) -> Table:
    names = {"predicted": "gᵀδ + ½ δᵀHδ", "slope": "gᵀδ", "half_curvature": "½ δᵀHδ", "distance": "‖δ‖"}
    rows = [
        [model["size"], *(shown(model["telling"]["rank"][name], 2) for name in names)] for model in models
    ]
    title = "Rank correlation over windows with the measured L(last) − L(merge), δ = last − merge:"
    return Table(columns=["model", *names.values()], rows=rows, title=title)


def _spectra(results: dict[str, Any]) -> str:
    words = [
        f"{model['size']}: largest {_numbers(model['spectrum']['largest'])}, smallest "
        f"{_numbers(model['spectrum']['smallest'])}; ½ δᵀHδ of δ = last − merge is "
        f"{model['spectrum']['half_upward']:.4f} from directions that curve upwards, "
        f"−{-model['spectrum']['half_downward']:.4f} from others"
        for model in results["models"]
    ]
    return (
        f"Leading eigenvalues of H at the last merge ({results['spectrum_tokens']:,} tokens), so it is not "
        f"positive semi-definite where the smallest are negative, and what it makes of δ (Gauss quadrature, "
        f"{results['lanczos_steps']} Lanczos steps). " + ". ".join(words) + "."
    )


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values).replace("-", "−")


def draw(results: dict[str, Any]) -> Any:
    """A row a model: δᵢᵀHδⱼ about the annealed model, and the measured gain of each window over the predicted
    one.
    """
    alt = require_altair()
    rows = [
        alt.hconcat(_heat(alt, model), _scatter(alt, model)).resolve_scale(color="independent")
        for model in results["models"]
    ]
    return finished(alt.vconcat(*rows).resolve_scale(color="independent"))


def _heat(alt: Any, model: dict[str, Any]) -> Any:
    matrix = _last(model, "annealed")
    cells = [
        {"i": i, "j": j, "value": value}
        for i, row in zip(matrix["steps"], matrix["matrix"], strict=True)
        for j, value in zip(matrix["steps"], row, strict=True)
    ]
    reach = max(abs(cell["value"]) for cell in cells)
    colour = alt.Color(
        "value:Q",
        title="δᵢᵀHδⱼ",
        scale=alt.Scale(scheme="blueorange", domain=[-reach, reach]),
        legend=alt.Legend(format=".2~g"),
    )
    return (
        alt.Chart(alt.Data(values=cells), width=250, height=250, title=f"{model['size']}, θ* = annealed")
        .mark_rect()
        .encode(
            x=alt.X("j:O", title="step of checkpoint j"),
            y=alt.Y("i:O", title="of checkpoint i"),
            color=colour,
        )
    )


def _scatter(alt: Any, model: dict[str, Any]) -> Any:
    points = [
        {
            "x": row["predicted"]["value"],
            "y": row["measured"]["value"],
            "x_low": row["predicted"]["low"],
            "x_high": row["predicted"]["high"],
            "low": row["measured"]["low"],
            "high": row["measured"]["high"],
            "end": row["end"],
        }
        for row in model["windows"]
    ]
    ends = [value for p in points for value in (p["x"], p["y"])]
    line = alt.Data(values=[{"x": value, "y": value} for value in (min(ends), max(ends))])
    equal = alt.Chart(line).mark_line(strokeDash=[4, 4], color="#999999").encode(x="x:Q", y="y:Q")
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("x:Q", title="gᵀδ + ½ δᵀHδ at the merge, validation text (nats)"),
        color=alt.Color("end:Q", title="end of window", scale=alt.Scale(scheme="viridis")),
    )
    y = alt.Y("y:Q", title="L(last) − L(merge), held-out text (nats)")
    bars = base.mark_rule(opacity=0.5).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    across = base.mark_rule(opacity=0.5).encode(x="x_low:Q", x2="x_high:Q", y=y)
    dots = base.mark_point(filled=True, size=40).encode(y=y)
    return (equal + bars + across + dots).properties(width=300, height=250, title=f"{model['size']}, windows")
