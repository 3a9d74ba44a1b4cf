"""The demo at toy size: the same steps, a report with every section, and nothing done twice."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pma import engine
from pma.demo import run_demo, story
from pma.errors import UsageError
from pma.evaluation import Document
from pma.pretraining import corpus, load_recipe


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nano recipes cut to 60 steps of 512 tokens, a thirtieth of the default text, few cloze items."""

    def shortened(name: str):
        recipe = load_recipe(name)
        run = replace(recipe.run, tokens=60 * 512, checkpoint_every_tokens=4 * 512, batch_sequences=8)
        return replace(recipe, run=run, optimizer=replace(recipe.optimizer, warmup_steps=4))

    whole = corpus.standard_library

    def little() -> list[Document]:
        return [Document(name=d.name, text=d.text[:1000], group=d.group) for d in whole()[::3]]

    monkeypatch.setattr(story, "load_recipe", shortened)
    monkeypatch.setattr(corpus, "standard_library", little)
    monkeypatch.setattr(story, "_CLOZE_ITEMS", 20)


class Watched:
    """Counts training steps, and can stop at one."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps = 0
        self.said: list[str] = []
        self._stop_at = stop_at

    @contextmanager
    def bar(self, title: str) -> Iterator[object]:
        def step(now: int, last: int, loss: float | None) -> None:
            self.steps += 1
            if self.steps == self._stop_at:
                raise KeyboardInterrupt

        yield step


def test_the_story_is_whole_and_told_once(tmp_path: Path, toy: None) -> None:
    folder = tmp_path / "demo"
    stopped = Watched(stop_at=30)
    with pytest.raises(BaseException, match="pre-training stopped"):
        run_demo(folder, mixture_of_experts=False, say=stopped.said.append, bar=stopped.bar)
    assert not (folder / "report.html").exists()

    watched = Watched()
    result = run_demo(folder, mixture_of_experts=False, say=watched.said.append, bar=watched.bar)
    assert (
        watched.steps == 60 - 28 + 12 + 12
    )  # went on from checkpoint 28; anneal; constant run at that length

    assert [row["name"] for row in result["comparison"]] == [
        "last", "sma", "wma", "ema:0.2", "annealed", "raw later", "sma later",
    ]  # fmt: skip
    for row in result["comparison"][1:]:
        assert row["improvement"]["standard_error"] > 0
    assert result["comparison"][4]["extra_tokens"] == 12 * 512
    assert {point["kind"] for point in result["curve"]} == {"raw", "merged", "annealed"}
    assert engine.verify(folder / "merged" / "wma").findings == ()
    page = (folder / "report.html").read_text()
    for expected in (
        "Comparison",
        "Held-out loss over training",
        "Training",
        "Commands that repeat each step",
    ):
        assert expected in page
    assert {p.name for p in folder.glob("*.png")} == {
        "comparison.png", "training.png", "held-out-loss-over-training.png",
    }  # fmt: skip

    again = Watched()
    second = run_demo(folder, mixture_of_experts=False, say=again.said.append, bar=again.bar)
    assert again.steps == 0
    assert second["comparison"] == result["comparison"]


def test_the_commands_in_the_report_parse(tmp_path: Path, toy: None) -> None:
    """Every line names a command and flags that exist; what it would do is what the demo did."""
    import shlex

    import typer.main

    from pma.cli import app
    from pma.demo.steps import Demo

    group = typer.main.get_command(app)
    for command in Demo(folder=tmp_path / "a folder", recipe=load_recipe("nano-moe")).commands():
        program, name, *arguments = shlex.split(command["line"])
        assert program == "pma"
        context = group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
        assert context.params


def test_a_mixture_of_experts_has_its_own_folder(tmp_path: Path, toy: None) -> None:
    watched = Watched()
    folder = tmp_path / "demo"
    result = run_demo(folder, mixture_of_experts=True, say=watched.said.append, bar=watched.bar)
    assert "mixture of experts" in result["lead"]
    with pytest.raises(UsageError, match="holds the demo of nano-moe"):
        run_demo(folder, mixture_of_experts=False, say=watched.said.append, bar=watched.bar)
    config = json.loads((folder / "merged" / "sma" / "config.json").read_text())
    assert config["num_experts"] == 8


def test_a_folder_with_other_things_is_refused(tmp_path: Path, toy: None) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not a demo"):
        run_demo(tmp_path, mixture_of_experts=False, say=print, bar=Watched().bar)
