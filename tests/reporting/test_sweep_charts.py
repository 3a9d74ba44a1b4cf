"""Charts of a sweep: the data is in them, awkward shapes are drawn, and names cannot harm the renderer."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pma.errors import InputError
from pma.reporting.sweep_charts import SCORE, sweep_chart, write_sweep_chart

HOSTILE = "<script>alert(1)</script></script>\x1b[2J\x00"


def row(**changes: Any) -> dict[str, Any]:
    plain = {"scheme": "sma", "last": 6, "every": "8B tokens", "every_order": 8.0, "at": 900, "loss": 3.0}
    return {**plain, "standard_error": 0.01, "gain": 0.05, **changes}


def grid(
    schemes: list[str], lasts: list[int], everys: dict[str, float], ats: list[int]
) -> list[dict[str, Any]]:
    return [
        row(
            scheme=s, last=n, every=v, every_order=order, at=at, loss=3 + n / 100 + order / 1000 + at / 10_000
        )
        for s in schemes
        for n in lasts
        for v, order in everys.items()
        for at in ats
    ]


FULL = grid(["sma", "wma"], [15, 3], {"8B tokens": 8, "16B tokens": 16, "-": 0}, [900, 600])


def panels(spec: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The heat maps and the curves of a chart: its panels, which are what has layers, each with its data."""
    spec = {"data": spec["layer"][0].get("data"), **spec} if "layer" in spec else spec
    if "layer" in spec:
        return ([spec], []) if spec["layer"][0]["mark"]["type"] == "rect" else ([], [spec])
    # altair moves data that all parts share up to the whole
    shared = {"data": spec["data"]} if "data" in spec else {}
    found = [panels({**shared, **part}) for part in spec.get("vconcat", []) + spec.get("concat", [])]
    return [p for maps, _ in found for p in maps], [p for _, curves in found for p in curves]


def rows_of(spec: dict[str, Any], panel: dict[str, Any]) -> list[dict[str, Any]]:
    data = panel["data"]
    values = data["values"] if "values" in data else spec["datasets"][data["name"]]
    assert isinstance(values, list)
    return values


def test_every_merge_is_in_a_heat_map_and_in_a_curve() -> None:
    spec = sweep_chart(FULL).to_dict()
    maps, curves = panels(spec)
    assert (len(maps), len(curves)) == (4, 6)  # scheme × at, every × at
    for drawn in (maps, curves):
        shown = [cell for panel in drawn for cell in rows_of(spec, panel)]
        names = ("scheme", "last", "every_order", "at", "loss", "gain")
        assert sorted([r[n] for n in names] for r in shown) == sorted([r[n] for n in names] for r in FULL)
    encoding = maps[0]["layer"][0]["encoding"]
    assert encoding["x"]["scale"]["domain"] == [3, 15]
    assert encoding["y"]["scale"]["domain"] == ["all", "8B tokens", "16B tokens"]
    assert [p["title"]["text"] for p in maps[:2]] == ["sma, step 600", "wma, step 600"]
    assert curves[-1]["title"]["text"] == "16B tokens apart, step 900"


def test_bars_are_intervals_and_lower_loss_is_greener() -> None:
    spec = sweep_chart([row(loss=3.0), row(last=3, loss=3.5)]).to_dict()
    [heat_map], [curve] = panels(spec)
    scale = heat_map["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == [3.0, 3.5]
    assert scale["range"] == ["#2f7d5b", "#edf5f1"]
    bars = {r["last"]: (r["low"], r["high"]) for r in rows_of(spec, curve)}
    assert bars[6] == pytest.approx((2.9804, 3.0196))


def test_of_scores_the_higher_is_greener(tmp_path: Path) -> None:
    rows = [row(loss=0.3), row(last=3, loss=0.5), row(last=9, loss=0.31)]
    spec = sweep_chart(rows, SCORE).to_dict()
    [heat_map], _ = panels(spec)
    scale = heat_map["layer"][0]["encoding"]["color"]["scale"]
    assert (scale["domain"], scale["range"]) == ([0.3, 0.5], ["#edf5f1", "#2f7d5b"])
    assert [cell["last"] for cell in rows_of(spec, heat_map) if cell["dark"]] == [3]
    _, page = write_sweep_chart(rows, tmp_path / "scores", SCORE)
    assert "Score by scheme and window" in page.read_text()


def test_cells_show_gains_or_else_losses() -> None:
    for gain, texts in ((0.012345, ["+0.0500", "+0.0123"]), (None, ["3.0000", "3.0000"])):
        spec = sweep_chart([row(last=3), row(gain=gain)]).to_dict()
        [heat_map], _ = panels(spec)
        assert [cell["text"] for cell in rows_of(spec, heat_map)] == texts


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row()], (0, 1)),
        ([row(standard_error=0.0, gain=None)], (0, 1)),
        ([row(scheme="sma"), row(scheme="wma")], (0, 1)),
        ([row(last=3), row()], (1, 1)),
        ([row(every="-", every_order=0), row()], (1, 2)),
        ([row(at=600), row()], (0, 2)),
        ([row(), row(last=3, loss=float("nan")), row(standard_error=float("nan"))], (0, 1)),
        ([row(scheme="sma"), row(scheme="wma", last=3)], (2, 1)),
    ],
)
def test_awkward_shapes(rows: list[dict[str, Any]], expected: tuple[int, int], tmp_path: Path) -> None:
    chart = sweep_chart(rows)
    maps, curves = panels(chart.to_dict())
    assert (len(maps), len(curves)) == expected
    assert "NaN" not in json.dumps(chart.to_dict())
    chart.save(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1_000


def test_nothing_to_draw() -> None:
    for rows in ([], [row(loss=float("inf"))]):
        with pytest.raises(InputError, match="nothing to draw"):
            sweep_chart(rows)


def test_picture_and_page_are_written_and_hostile_names_are_harmless(tmp_path: Path) -> None:
    rows = [row(scheme=HOSTILE, every=HOSTILE), row(last=3), row(loss=float("nan"))]
    picture, page = write_sweep_chart(rows, tmp_path / "new" / "sweep-0.5")
    assert (picture.name, page.name) == ("sweep-0.5.png", "sweep-0.5.html")
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "2 merges, 2 schemes." in text
    assert "Not drawn, as the loss is not finite: 1." in text
    assert text.count("</script>") == 1
    assert "<script>alert" not in text
    specs = re.search(r"const specs = (\[.*\]);\n", text)
    assert specs is not None
    assert "\\\\x1b[2J\\\\x00" in specs[1]
    assert "\\u001b" not in specs[1]
    # nothing is loaded from anywhere: no address in any tag's src or href but the empty icon
    assert re.findall(r'(?:src|href)="([^"]*)"', text[: text.index("const specs")]) == ["data:,"]
