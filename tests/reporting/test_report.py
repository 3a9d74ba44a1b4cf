"""The page: complete, self-contained, escaped; charts from awkward data; the table of models."""

import json
import re
from pathlib import Path

import pytest

from pma.errors import InputError
from pma.reporting import comparison_table, report_folder
from pma.reporting.charts import Series, training_chart
from pma.reporting.page import Section, render
from pma.testing import tiny_run
from pma.testing.builders import write_trainer_state

HOSTILE = "<script>alert(1)</script>\x1b[2J"


def estimate(value: float, error: float = 0.01) -> dict[str, float]:
    return {"value": value, "standard_error": error, "low": value - 2 * error, "high": value + 2 * error}


def row(name: str, **changes: object) -> dict[str, object]:
    plain = {"name": name, "loss": estimate(3.0), "bits_per_byte": 2.0, "cloze": None, "improvement": None}
    return {**plain, "gain_recovered": None, **changes}


def demo_results() -> dict[str, object]:
    return {
        "title": HOSTILE,
        "lead": HOSTILE,
        "verdict": HOSTILE,
        "protocol": "How.",
        "curve_protocol": "What.",
        "comparison": [
            row("last", title="last", kind="raw", extra_tokens=0),
            row("sma", title=HOSTILE, kind="merged", extra_tokens=0, improvement=estimate(0.1)),
            row("annealed", title="annealed", kind="annealed", extra_tokens=9, improvement=estimate(-0.2)),
        ],
        "curve": [{"tokens": t, "loss": 3 - t / 9, "model": HOSTILE, "kind": "merged"} for t in (1, 2)],
        "training": [
            Series(name=HOSTILE, kind="raw", losses=[(1, 3.0), (2, 2.5)], learning_rates=[(1, 0.1)]).__dict__
        ],
        "commands": [{"title": HOSTILE, "line": "pma merge <run>"}],
    }


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(demo_results()))
    page, pictures = report_folder(tmp_path, tmp_path / "out")
    text = page.read_text()
    body = text[: text.index('<script type="module">')]
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in body
    # nothing is loaded from anywhere: no address in any tag's src or href but the empty icon
    assert re.findall(r'(?:src|href)="([^"]*)"', text[: text.index("const specs")]) == ["data:,"]
    assert "import " not in text[text.index("const specs") :][:2000]
    assert [p.name for p in pictures] == ["comparison.png", "held-out-loss-over-training.png", "training.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5_000 for p in pictures)


def test_the_scripts_data_cannot_end_the_script() -> None:
    chart = training_chart([Series(name="</script><b>", kind="raw", losses=[(1, 1.0)], learning_rates=[])])
    page = render("t", "l", [Section(heading="h", chart=chart)], "f")
    assert page.count("</script>") == 1


def test_a_run_is_reported_from_its_own_log(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", steps=4)
    page, pictures = report_folder(tmp_path / "run", tmp_path / "out")
    assert "4 checkpoints, the newest at step 40 after 4K tokens." in page.read_text()
    assert [p.name for p in pictures] == ["training.png"]


def test_losses_that_are_not_numbers_do_not_break_the_chart(tmp_path: Path) -> None:
    for path in tiny_run(tmp_path / "run", steps=2):
        write_trainer_state(path, int(path.name.split("-")[1]), losses={10: float("nan")})
    page, _ = report_folder(tmp_path / "run", tmp_path / "out")
    specs = re.search(r"const specs = (\[.*\]);\n", page.read_text())
    assert specs is not None
    assert "NaN" not in specs[1]
    assert "1 logged losses are not finite" in page.read_text()


def test_nothing_to_report(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="no checkpoint"):
        report_folder(tmp_path, tmp_path / "out")
    path = tiny_run(tmp_path / "run", steps=1)[0]
    (path / "trainer_state.json").write_text('{"global_step": 10}')
    with pytest.raises(InputError, match="logs no loss"):
        report_folder(tmp_path / "run", tmp_path / "out")


def test_empty_columns_are_left_out() -> None:
    columns, rows = comparison_table([row("a"), row("b", improvement=estimate(0.1234, 0.02))])
    assert columns == ["model", "loss", "bits/byte", "better than last by"]
    assert rows[1] == ["b", "3.0000", "2.0000", "+0.1234 ± 0.0200"]
