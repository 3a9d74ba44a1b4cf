"""Pre-training with the real Trainer: checkpoints, tokens, learning rates, resume after a kill, forks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pma
from pma import trajectory
from pma.errors import InputError, Interrupted, UsageError
from pma.formats import interval_mean
from pma.pretraining import fork, pretrain
from pma.trajectory import Phase

from .recipes import DENSE, MIXTURE, tiny_recipe, tiny_text


def weights(checkpoint: Path) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes() for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }


def rates(checkpoint: Path) -> dict[int, float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}


class Kill(BaseException):
    """Stands in for a signal that nothing catches."""


def kill_at(step: int, error: type[BaseException] = Kill):
    def progress(now: int, last: int, loss: float | None) -> None:
        if now == step:
            raise error

    return progress


def test_checkpoints_say_their_step_tokens_and_rate(tmp_path: Path) -> None:
    made = pretrain(tiny_recipe(), tmp_path / "run", text=[str(tiny_text(tmp_path / "text"))])
    found = trajectory.discover([tmp_path / "run"])
    assert [(p.step, p.tokens) for p in found.points] == [(4, 256), (8, 512), (12, 768)]
    assert [p.phase for p in found.points] == [Phase.STABLE] * 3
    assert [p.learning_rate for p in found.points] == [1e-2] * 3
    assert made.checkpoint == tmp_path / "run" / "checkpoint-12"
    assert (made.step, made.tokens, made.steps_added) == (12, 768, 12)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert (tmp_path / "run" / "checkpoint-12" / "tokenizer.json").is_file()


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, model: dict) -> None:
    text = [str(tiny_text(tmp_path / "text"))]
    pretrain(tiny_recipe(model), tmp_path / "whole", text=text)
    with pytest.raises(Kill):
        pretrain(tiny_recipe(model), tmp_path / "killed", text=text, progress=kill_at(7))
    # a checkpoint that was being written when the kill came
    half = tmp_path / "killed" / "checkpoint-8"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    made = pretrain(tiny_recipe(model), tmp_path / "killed", text=text)
    assert made.resumed_from == 4
    assert weights(tmp_path / "killed" / "checkpoint-12") == weights(tmp_path / "whole" / "checkpoint-12")
    assert rates(tmp_path / "killed" / "checkpoint-12") == rates(tmp_path / "whole" / "checkpoint-12")


def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="same command"):
        pretrain(
            tiny_recipe(),
            tmp_path / "run",
            text=[str(tiny_text(tmp_path / "text"))],
            progress=kill_at(6, KeyboardInterrupt),
        )


def test_a_longer_run_is_the_same_run_longer(tmp_path: Path) -> None:
    text = [str(tiny_text(tmp_path / "text"))]
    pretrain(tiny_recipe(steps=16), tmp_path / "at once", text=text)
    pretrain(tiny_recipe(steps=8), tmp_path / "extended", text=text)
    made = pretrain(tiny_recipe(steps=16), tmp_path / "extended", text=text)
    assert made.steps_added == 8
    assert weights(tmp_path / "extended" / "checkpoint-16") == weights(tmp_path / "at once" / "checkpoint-16")
    assert pretrain(tiny_recipe(steps=8), tmp_path / "extended", text=text).steps_added == 0


@pytest.mark.parametrize(("anneal", "middle"), [("cosine", 0.5), ("linear", 0.5), ("1-sqrt", 1 - 0.5**0.5)])
def test_a_fork_decays_from_the_trunk(tmp_path: Path, anneal: str, middle: float) -> None:
    pretrain(tiny_recipe(steps=8), tmp_path / "run", text=[str(tiny_text(tmp_path / "text"))])
    made = fork(tmp_path / "run" / "checkpoint-8", tmp_path / "annealed", anneal=anneal, tokens=8 * 64)
    assert (made.step, made.resumed_from) == (16, 8)
    found = rates(made.checkpoint)
    assert found[8] == found[9] == 1e-2  # the rate a step uses: the decay starts with the whole rate
    assert found[13] == pytest.approx(1e-2 * middle)
    assert trajectory.discover([tmp_path / "annealed"]).points[-1].phase is Phase.DECAY
    assert trajectory.discover([tmp_path / "annealed"]).points[-1].tokens == 16 * 64


def test_a_fork_of_a_mixture_starts_from_the_trunks_experts(tmp_path: Path) -> None:
    """The first step after a fork has the loss of the trunk's next step: same weights, same data, same
    rate.
    """
    text = [str(tiny_text(tmp_path / "text"))]
    pretrain(tiny_recipe(MIXTURE, steps=8), tmp_path / "run", text=text)
    annealed = fork(tmp_path / "run" / "checkpoint-8", tmp_path / "annealed", anneal="cosine", tokens=4 * 64)
    trunk = pretrain(tiny_recipe(MIXTURE, steps=12), tmp_path / "run", text=text)
    losses = [
        dict(trajectory.discover([p.parent]).log.losses)[9] for p in (annealed.checkpoint, trunk.checkpoint)
    ]
    assert losses[0] == losses[1]


def test_a_fork_resumes_after_a_kill(tmp_path: Path) -> None:
    pretrain(tiny_recipe(steps=8), tmp_path / "run", text=[str(tiny_text(tmp_path / "text"))])
    start = tmp_path / "run" / "checkpoint-8"
    whole = fork(start, tmp_path / "whole", anneal="cosine", tokens=8 * 64)
    with pytest.raises(Kill):
        fork(start, tmp_path / "killed", anneal="cosine", tokens=8 * 64, progress=kill_at(14))
    resumed = fork(start, tmp_path / "killed", anneal="cosine", tokens=8 * 64)
    assert resumed.resumed_from == 12
    assert weights(resumed.checkpoint) == weights(whole.checkpoint)


def test_seeds_differ(tmp_path: Path) -> None:
    text = [str(tiny_text(tmp_path / "text"))]
    first = pretrain(tiny_recipe(steps=4, seed=1), tmp_path / "a", text=text)
    second = pretrain(tiny_recipe(steps=4, seed=2), tmp_path / "b", text=text)
    assert weights(first.checkpoint) != weights(second.checkpoint)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    text = [str(tiny_text(tmp_path / "text"))]
    pretrain(tiny_recipe(steps=4), tmp_path / "run", text=text)
    with pytest.raises(UsageError, match="seed: 0 there, 5 asked"):
        pretrain(tiny_recipe(steps=4, seed=5), tmp_path / "run", text=text)


def test_a_folder_with_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not a run"):
        pretrain(tiny_recipe(), tmp_path)


def test_forks_that_cannot_be(tmp_path: Path) -> None:
    pretrain(tiny_recipe(steps=8), tmp_path / "run", text=[str(tiny_text(tmp_path / "text"))])
    start = tmp_path / "run" / "checkpoint-8"
    with pytest.raises(UsageError, match="cosine, linear, 1-sqrt"):
        fork(start, tmp_path / "a", anneal="step", tokens=640)
    made = fork(start, tmp_path / "b", anneal="cosine", tokens=256)
    with pytest.raises(UsageError, match="annealed already"):
        fork(made.checkpoint, tmp_path / "c", anneal="cosine", tokens=256)


def test_the_mixture_is_trained_with_a_load_balancing_loss(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = pretrain(tiny_recipe(MIXTURE, steps=4), tmp_path / "run", text=[str(tiny_text(tmp_path / "text"))])
    model = AutoModelForCausalLM.from_pretrained(made.checkpoint)
    assert model.config.output_router_logits
    assert model.config.router_aux_loss_coef > 0


def test_a_newest_checkpoint_that_is_cut_short_is_gone_back_behind(tmp_path: Path) -> None:
    import os

    text = [str(tiny_text(tmp_path / "text"))]
    whole = pretrain(tiny_recipe(), tmp_path / "run", text=text)
    expected = weights(whole.checkpoint)
    os.truncate(whole.checkpoint / "model.safetensors", 500)
    again = pretrain(tiny_recipe(), tmp_path / "run", text=text)
    assert again.resumed_from == 8
    assert weights(again.checkpoint) == expected


def test_a_damaged_run_record_is_an_error(tmp_path: Path) -> None:
    pretrain(tiny_recipe(steps=4), tmp_path / "run", text=[str(tiny_text(tmp_path / "text"))])
    (tmp_path / "run" / "run.json").write_text('{"pma_run": 1}')
    with pytest.raises(InputError, match="damaged"):
        pretrain(tiny_recipe(steps=4), tmp_path / "run")


@pytest.mark.parametrize("model", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_each_checkpoint_has_the_mean_since_the_last_one(tmp_path: Path, model: dict) -> None:
    text = [str(tiny_text(tmp_path / "text"))]
    pretrain(tiny_recipe(model), tmp_path / "whole", text=text)
    with pytest.raises(Kill):
        pretrain(tiny_recipe(model), tmp_path / "killed", text=text, progress=kill_at(7))
    pretrain(tiny_recipe(model), tmp_path / "killed", text=text)
    for last in (4, 8, 12):
        path = interval_mean.find(tmp_path / "whole" / f"checkpoint-{last}")
        record = interval_mean.read_record(path)
        assert (record.first_step, record.last_step, record.updates) == (last - 3, last, 4)
        assert record.averaged == "weights"
        assert load_file(path).keys() == weights(path.parent).keys()
        again = tmp_path / "killed" / f"checkpoint-{last}" / path.name
        assert again.read_bytes() == path.read_bytes()


def test_interval_means_can_be_left_out(tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=4, interval_means=False)
    made = pretrain(recipe, tmp_path / "run", text=[str(tiny_text(tmp_path / "text"))])
    assert interval_mean.find(made.checkpoint) is None


def test_a_merge_takes_the_means_that_training_stored(tmp_path: Path) -> None:
    made = pretrain(tiny_recipe(MIXTURE), tmp_path / "run", text=[str(tiny_text(tmp_path / "text"))])
    out = tmp_path / "merged"
    choice = pma.Choice(paths=(made.run,), window=pma.Window(last=3))
    pma.merge(choice, out, pma.MergeOptions(use="interval-means"))
    means = [load_file(interval_mean.find(made.run / f"checkpoint-{last}")) for last in (4, 8, 12)]
    for name, tensor in load_file(out / "model.safetensors").items():
        expected = sum(mean[name].double() for mean in means) / 3
        assert torch.equal(tensor, expected.float()), name
