"""Looks in words and charts, and in the report of a run: complete, offline, and not fooled by the store."""

import copy
from pathlib import Path

import pytest

from pma.analysis.keeping import LOOKS
from pma.errors import FormatError
from pma.reporting import report_folder
from pma.reporting.look_charts import line_chart, plane_chart
from pma.reporting.look_sections import look_sections
from pma.reporting.look_words import line_words, look_words
from pma.results import STORE_FILE, Store
from pma.testing import tiny_run

from ..watch.browser import MISSING, browser, wait_for
from .looks import made_up_look

HEADINGS = [
    "Diagnosis: the line from last through the merge",
    "Diagnosis: slopes and curvatures",
    "Diagnosis: the plane of merge and last",
    "Diagnosis: routing of experts",
]
HOSTILE = "<script>alert(1)</script>"


def kept(run: Path, *looks: object) -> None:
    with Store(run / STORE_FILE) as store:
        for number, look in enumerate(looks):
            store.put(f"look {number}", LOOKS, merge={}, result=look)  # type: ignore[arg-type]
        store.put("another", "evaluation", merge={}, result={"loss": 1})


def test_each_part_has_a_section():
    assert [section.heading for section in look_sections(made_up_look())] == HEADINGS
    dense = made_up_look(mixture=False)
    assert [section.heading for section in look_sections(dense)] == HEADINGS[:3]
    dense |= {
        "bending": None,
        "contours": None,
        "left_out": {"bending": "takes 9 GB", "contours": "no plane"},
    }
    (only,) = look_sections(dense)
    assert "Slopes and curvatures left out: takes 9 GB." in only.paragraphs
    assert "The plane left out: no plane." in only.paragraphs


def test_words_follow_the_numbers():
    merge = line_words(made_up_look(best_t=1.0))
    assert merge[0] == (
        "The merge's loss is 3.0000: 0.2000 ± 0.0000 below last, 0.2200 ± 0.0000 below that of the best "
        "single checkpoint (step 20)."
    )
    assert merge[1].startswith("Advised: the merge. By the half to choose by, no other place")
    (_, beyond) = line_words(made_up_look(best_t=1.5))
    assert beyond.startswith("Advised: t = 1.5 on the line from last (0) through the merge (1)")
    assert beyond.endswith("0.0500 ± 0.0000 below the merge, 0.4500 ± 0.0000 below last.")
    (worse, last) = line_words(made_up_look(best_t=0.0))
    assert "0.2000 ± 0.0000 above last" in worse
    assert last.startswith("Advised: last itself")
    assert "nothing is told" in line_words(made_up_look(best_t=9))[-1]
    chance = line_words(made_up_look(best_t=1.1, noise=9.0))
    assert "not by more than chance" in chance[1]
    unsure = made_up_look(best_t=1.5)
    unsure["line"]["gain_over_merge"]["low"] = -0.1
    assert "better than the merge is not confirmed" in line_words(unsure)[1]
    unsure["line"]["gain"]["low"] = 0.0
    assert "better than the merge and last is not confirmed" in line_words(unsure)[1]


def test_all_is_said_once():
    said = look_words(made_up_look())
    assert "20 of 30 documents, the first 100 characters of each; 1K tokens" in said[0]
    assert "chance is 50%" in said[-1]
    assert len(said) == 6
    assert len(set(said)) == 6


def test_the_charts_hold_the_looks_numbers():
    look = made_up_look(best_t=1.5)
    spec = line_chart(look["line"], look["bending"]).to_dict()
    data = [layer["data"]["values"] for layer in spec["layer"]]
    parabola, measured = data[0], data[2]
    for row, place in zip(measured, look["line"]["places"], strict=True):
        assert (row["t"], row["loss"]) == (place["t"], place["loss"]["value"])
        if place["gain"] is not None:
            assert row["high"] - row["low"] == pytest.approx(place["gain"]["high"] - place["gain"]["low"])
    assert {row["name"] for row in data[-1]} == {"last", "merge", "advised"}
    # the parabola is the quadratic's own: through the merge, with its slope and curvature
    merge = next(p["loss"]["value"] for p in look["line"]["places"] if p["t"] == 1)
    slope, curvature = look["bending"]["parabola"]
    for row in parabola:
        away = 1 - row["t"]
        assert row["loss"] == pytest.approx(merge + away * slope + away**2 * curvature / 2)
    plane = plane_chart(look["contours"]).to_dict()
    assert [row["step"] for row in plane["layer"][1]["data"]["values"]] == [10, 20, 30, 40]
    lines = plane["datasets"][plane["layer"][0]["data"]["name"]].splitlines()
    assert lines[0] == "x,x2,y,y2,loss"
    losses = [float(line.split(",")[-1]) for line in lines[1:]]
    flat = [value for row in look["contours"]["loss"] for value in row]
    assert min(losses) <= min(flat) * 1.001
    assert max(losses) == pytest.approx(max(flat), rel=1e-3)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The report of a run of which two looks are kept, the newer with text that means harm."""
    run = tmp_path_factory.mktemp("reported") / "run"
    tiny_run(run, steps=4)
    hostile = wrong(made_up_look(best_t=1.5), "contours", "third", value=HOSTILE)
    kept(run, made_up_look(best_t=1.0), wrong(hostile, "left_out", value={"bending": "</script><b>"}))
    return report_folder(run, run / "out")


def test_a_runs_report_has_the_newest_look(reported: tuple[Path, list[Path]]) -> None:
    page, pictures = reported
    text = page.read_text()
    for heading in HEADINGS:
        assert f"<h2>{heading}</h2>" in text
    assert "Advised: t = 1.5" in text
    assert pictures[1].name == "diagnosis-the-line-from-last-through-the-merge.png"
    assert len(pictures) == 5
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5_000 for p in pictures)


def test_text_in_a_look_is_escaped(reported: tuple[Path, list[Path]]) -> None:
    text = reported[0].read_text()
    assert HOSTILE not in text
    assert "<b>" not in text
    assert text.count("</script>") == 1


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
def test_the_page_is_drawn_without_a_network(reported: tuple[Path, list[Path]], tmp_path: Path) -> None:
    drawn = """
    const charts = document.querySelectorAll(".chart svg");
    return [...charts].map(chart => chart.querySelectorAll("path").length);
    """
    with browser(tmp_path / "profile") as window:
        window.open(reported[0].absolute().as_uri())
        counts = wait_for(lambda: len(window.run(drawn)) == 5 and window.run(drawn))
        assert min(counts) > 10
        assert counts[3] > 80 * 80  # the plane's cells
        assert window.console() == []
        fetched = window.run("return performance.getEntriesByType('resource').map(r => r.name)")
        assert fetched in ([], ["data:,"])


def wrong(look: dict[str, object], *path: object, value: object) -> dict[str, object]:
    changed = copy.deepcopy(look)
    inner = changed
    for part in path[:-1]:
        inner = inner[part]  # type: ignore[index, assignment]
    inner[path[-1]] = value  # type: ignore[index]
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("line",), None),
        (("line", "places", 0, "t"), "\x1b[2J"),
        (("line", "places", 0, "loss", "value"), "</script>"),
        (("line", "places"), []),
        (("contours", "loss"), [[1.0]]),
        (("contours", "checkpoints"), []),
        (("bending", "parabola"), [1, 2, 3]),
        (("experts", "merge", "by_layer"), 7),
        (("text", "tokens"), {}),
        (("steps",), []),
    ],
)
def test_a_store_that_holds_something_else_is_refused(tmp_path: Path, path, value) -> None:
    tiny_run(tmp_path / "run", steps=2)
    kept(tmp_path / "run", wrong(made_up_look(), *path, value=value))
    with pytest.raises(FormatError, match="holds a look that cannot be read"):
        report_folder(tmp_path / "run", tmp_path / "out")
