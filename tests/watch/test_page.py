"""The page in a real browser, offline: charts drawn, nothing on the console, a point more when one lands."""

import re
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest

from pma.errors import UsageError
from pma.watch import page_file
from pma.watch.alone import alone_in
from pma.watch.page_file import PageFile
from pma.watch.serving import served

from .browser import MISSING, Browser, browser, wait_for
from .fakes import land, settle, watching

needs_chromium = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
DOTS = """
const groups = document.querySelectorAll("#chart0 .mark-symbol.role-mark");
return [...groups].map(group => group.querySelectorAll("path").length);
"""


def dots(page: Browser) -> list[int]:
    """Points that are drawn: of raw and merged together, and of the gain."""
    return list(wait_for(lambda: page.run(DOTS)))


@needs_chromium
def test_the_curve_gains_a_point_when_a_checkpoint_lands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_file, "_RELOAD_SECONDS", 1)
    run = tmp_path / "run"
    land(run, 10, 4.0), land(run, 20, 3.0)
    watch = watching(run, page=PageFile(run))
    settle(watch)
    with browser(tmp_path / "profile") as page:
        page.open((run / "report.html").absolute().as_uri())
        assert dots(page) == [3, 1]  # two raw, one merged
        assert "Live" in page.run("return document.querySelector('p.status.live').textContent")
        page.run("window.before = true")
        land(run, 30, 2.0)
        settle(watch)
        # the page reloads itself
        wait_for(lambda: page.run("return window.before") is None and page.run(DOTS) == [5, 2])
        assert "Step 30" in page.run("return document.querySelector('p.lead').textContent")
        assert page.run("return document.querySelectorAll('tbody tr').length") == 3
        watch.close()
        wait_for(lambda: page.run("return document.querySelector('p.status').className") == "status")
        assert page.run("return document.querySelector('meta[http-equiv]')") is None
        assert page.console() == []
        assert page.run("return performance.getEntriesByType('resource').map(r => r.name)") in (
            [],
            ["data:,"],
        )


@needs_chromium
def test_the_browser_of_the_tests_has_no_network_and_its_console_is_read(tmp_path: Path) -> None:
    page_file = tmp_path / "page.html"
    page_file.write_text('<img src="https://example.com/x.png"><script>console.error("seen")</script>')
    said: list[str] = []
    with browser(tmp_path / "profile") as page:
        page.open(page_file.as_uri())
        wait_for(lambda: said.extend(page.console()) or len(said) >= 2)
    assert any("seen" in words for words in said)
    assert any("example.com" in words and "ERR_" in words for words in said)


def test_the_page_is_replaced_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    land(run, 10, 4.0)
    watch = watching(run, page=PageFile(run))
    settle(watch)
    live = (run / "report.html").read_text()
    assert '<meta http-equiv="refresh" content="5">' in live
    watch.close()
    over = (run / "report.html").read_text()
    assert "http-equiv" not in over
    assert "The watch is over" in over
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


def test_names_and_notes_are_escaped(tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    land(run, 10, 4.0)
    (run / "checkpoint-20").mkdir()
    watch = watching(run, page=PageFile(run))
    watch.notes.append("</script><script>alert(1)</script>")
    settle(watch)
    text = (run / "report.html").read_text()
    assert "<b>run" not in text
    assert "<script>alert" not in text
    assert "checkpoint-20" in text  # what is not taken is said


def test_thousands_of_points_are_thinned_out(tmp_path: Path) -> None:
    from pma.reporting.watch_page import MOST_DRAWN, Watched, thinned, watch_page

    points = [
        {
            "step": step,
            "tokens": None,
            "window": [1, step],
            "note": None,
            "values": {
                "loss_last": 3.0,
                "loss_last_error": 0.1,
                "loss_merged": 2.9,
                "loss_merged_error": 0.1,
                "gain": 0.1,
                "gain_error": 0.01,
            },
        }
        for step in range(1, 5001)
    ]
    drawn = [point["step"] for point in thinned(points)]
    assert (len(drawn), drawn[0], drawn[-100:]) == (MOST_DRAWN, 1, list(range(4901, 5001)))
    assert {b - a for a, b in pairwise(drawn[:200])} <= {24, 25}
    page = watch_page(Watched(run="r", merge="m", points=thinned(points), of_points=5000, written="now"))
    assert "Drawn: 300 of 5000 points" in page
    assert len(page) < 1_300_000
    assert thinned(points[:7]) == points[:7]
    specs = re.search(r"const specs = (\[.*\]);\n", page)
    assert specs is not None


def test_a_port_serves_the_page_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    (tmp_path / "secret").write_text("secret")
    with served(page, 0) as address:
        assert address.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address)  # not written yet
        page.write_text("<p>hello")
        for place in ("", "report.html", "?x=1"):
            with urllib.request.urlopen(address + place) as answer:
                assert answer.read() == b"<p>hello"
        for place in ("secret", "../secret", "%2e%2e/secret"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + place)
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(UsageError, match=f"--port {port} cannot be used"), served(page, port):
            pass
    with served(page, port):
        pass  # it was let go of


def test_two_watches_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "out"):
        with pytest.raises(UsageError, match="another pma watch"), alone_in(tmp_path / "out"):
            pass
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "out"):
        pass
