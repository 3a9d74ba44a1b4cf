"""Going on from what `pma init` wrote, in a new run: the same data or with some left out, the right rate."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pma import trajectory, verbs
from pma.errors import InputError, Interrupted, UsageError
from pma.pretraining import fork, pretrain, resume, run_folder
from pma.pretraining.tokens import PackedSequences, load_tokens
from pma.trajectory import Window
from pma.verbs import Choice

from .recipes import DENSE, MIXTURE, tiny_recipe, tiny_text

MODES = ("newest", "second-moment", "average", "reset")


def weights(checkpoint: Path) -> dict[str, bytes]:
    found = load_file(checkpoint / "model.safetensors").items()
    return {name: tensor.numpy().tobytes() for name, tensor in found}


def history(checkpoint: Path, what: str) -> dict[int, float]:
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[what] for entry in entries if what in entry}


def loss_at(checkpoint: Path, run: Path, step: int) -> float:
    """What a model that transformers loads makes of the data that are next after `step` in the run."""
    tokens = load_tokens(run / "text" / "tokens.npy")
    data = PackedSequences(tokens, context_tokens=16, count=100, seed=0)
    ids = torch.stack([data[index]["input_ids"] for index in range(4 * step, 4 * step + 4)])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.train()
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def trained(root: Path, model: dict[str, object]) -> Path:
    pretrain(tiny_recipe(model, steps=16), root / "run", text=[str(tiny_text(root / "text"))])
    return root / "run"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("dense"), DENSE)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("mixture"), MIXTURE)


@pytest.fixture(params=["dense", "mixture"])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def init(run: Path, out: Path, *, last: int = 2, **how) -> Path:
    made = verbs.init(Choice(paths=(run,), window=Window(last=last)), out, before_step=13, **how)
    assert made.resume_command == f"pma pretrain --resume-from {out} -o NEW_RUN"
    return out


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_from_the_merge(run: Path, tmp_path: Path, mode: str) -> None:
    start = init(run, tmp_path / "start", optimizer=mode)
    made = resume(start, tmp_path / "again")
    assert (made.step, made.resumed_from, made.steps_added) == (16, 12, 4)
    assert history(made.checkpoint, "learning_rate") == history(run / "checkpoint-16", "learning_rate")
    assert history(made.checkpoint, "loss")[13] == pytest.approx(loss_at(start, run, 12), abs=1e-5)
    found = trajectory.discover([tmp_path / "again"])
    assert [(point.step, point.tokens) for point in found.points] == [(16, 1024)]


def test_one_checkpoint_goes_on_to_the_weights_of_the_run_itself(run: Path, tmp_path: Path) -> None:
    """Weights, moments, schedule, data and random state: nothing is lost on the way."""
    for start in (init(run, tmp_path / "start", last=1), run / "checkpoint-12"):
        made = resume(start, tmp_path / f"from {start.name}")
        assert weights(made.checkpoint) == weights(run / "checkpoint-16")


def test_data_that_are_skipped(dense: Path, tmp_path: Path) -> None:
    start = init(dense, tmp_path / "start")
    made = resume(start, tmp_path / "skipping", skip_steps=5)
    assert made.step == 16
    assert history(made.checkpoint, "loss")[13] == pytest.approx(loss_at(start, dense, 17), abs=1e-5)
    with pytest.raises(UsageError, match="skip_steps: 5 there, 4 asked for"):
        resume(start, tmp_path / "skipping", skip_steps=4)


def test_a_resumed_run_that_is_killed_goes_on(dense: Path, tmp_path: Path) -> None:
    def stop(now: int, last: int, loss: float | None) -> None:
        if now == 18:
            raise KeyboardInterrupt

    start = init(dense, tmp_path / "start")
    whole = resume(start, tmp_path / "whole", tokens=20 * 64, skip_steps=2)
    with pytest.raises(Interrupted):
        resume(start, tmp_path / "killed", tokens=20 * 64, skip_steps=2, progress=stop)
    again = resume(start, tmp_path / "killed", tokens=20 * 64, skip_steps=2)
    assert again.resumed_from == 16
    assert weights(again.checkpoint) == weights(whole.checkpoint)


def test_sequences_after_a_gap() -> None:
    tokens = np.arange(160, dtype=np.uint32)
    whole = PackedSequences(tokens, context_tokens=16, count=30, seed=1)
    skipping = PackedSequences(tokens, context_tokens=16, count=30, seed=1, skip=(7, 12))
    for index in range(18):
        expected = whole[index if index < 7 else index + 12]["input_ids"]
        assert torch.equal(skipping[index]["input_ids"], expected)


def test_an_annealed_fork_goes_on_annealing(dense: Path, tmp_path: Path) -> None:
    whole = fork(dense / "checkpoint-8", tmp_path / "annealed", anneal="linear", tokens=8 * 64)
    made = resume(tmp_path / "annealed" / "checkpoint-12", tmp_path / "again")
    assert weights(made.checkpoint) == weights(whole.checkpoint)


def test_starts_that_cannot_be(dense: Path, tmp_path: Path) -> None:
    start = init(dense, tmp_path / "start")
    with pytest.raises(UsageError, match="at step 12 already"):
        resume(start, tmp_path / "a", tokens=12 * 64)
    verbs.init(Choice(paths=(dense,), window=Window(last=2)), tmp_path / "weights", purpose="ct")
    with pytest.raises(UsageError, match="holds no state of the Trainer"):
        resume(tmp_path / "weights", tmp_path / "b")
    with pytest.raises(UsageError, match="count of steps"):
        resume(start, tmp_path / "c", skip_steps=-1)
    record = json.loads((start / "pma.json").read_text())
    record["sources"][-1]["path"] = str(tmp_path / "gone" / "checkpoint-12")
    (start / "pma.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"holds no run\.json"):
        resume(start, tmp_path / "d")
    assert not any((tmp_path / name).exists() for name in "abcd")


def test_a_run_that_is_asked_to_be_shorter_stays_as_long_as_it_is(dense: Path) -> None:
    before = (dense / "run.json").read_bytes()
    record = run_folder.read_record(dense)
    recipe = record.recipe
    shorter = replace(recipe, run=replace(recipe.run, tokens=recipe.run.tokens // 2))
    assert pretrain(shorter, dense, text=record.text).steps_added == 0
    assert (dense / "run.json").read_bytes() == before


@pytest.mark.parametrize("name", ["nothing", "run"])
def test_a_start_that_is_no_checkpoint(dense: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no checkpoint of the Trainer"):
        resume(dense if name == "run" else tmp_path / name, tmp_path / "out")
