"""`pma init` of the transformers Trainer's checkpoints: what it writes, against numpy; and the Trainer going
on from it, with the loss of the merge and the rate of the step.
"""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pma import engine, formats, verbs
from pma.cli import app
from pma.errors import InputError, MismatchError, UsageError
from pma.remote import location
from pma.testing import tiny_run
from pma.trajectory import Window
from pma.verbs import Choice

from .trainer_runs import (
    EXPERTS,
    batch,
    logged,
    loss_on,
    mean,
    optimizer_state,
    trainer,
    weights,
)

MODES = ("newest", "second-moment", "average", "reset")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints, of steps 3, 6, 9, 12, the rate of each step another."""
    out = tmp_path_factory.mktemp("trainer") / "run"
    trainer(out).train()
    return out


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trainer") / "mixture"
    trainer(out, EXPERTS).train()
    return out


def init(run: Path, out: Path, *, last: int = 3, **how) -> verbs.Restart:
    window = Window(last=last)
    # the rate falls: the windows cross phases, which is not what is tested here
    chosen = Choice(paths=(run,), window=window, allow_mixed_phases=True)
    return verbs.init(chosen, out, **how)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_is_what_the_mode_says(run: Path, tmp_path: Path, mode: str) -> None:
    made = init(run, tmp_path / "out", optimizer=mode, before_step=12)
    assert made.step == 9
    sources = [run / f"checkpoint-{step}" for step in (3, 6, 9)]
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, mean([weights(source)[name] for source in sources]))
    states = [optimizer_state(source) for source in sources]
    found = optimizer_state(tmp_path / "out")
    assert found["param_groups"] == states[-1]["param_groups"]
    assert found["state"].keys() == states[-1]["state"].keys()
    for number, state in found["state"].items():
        each = [source["state"][number] for source in states]
        zero = torch.zeros_like(each[-1]["exp_avg"])
        first = {"newest": each[-1]["exp_avg"], "average": mean([s["exp_avg"] for s in each])}
        second = {"average": mean([s["exp_avg_sq"] for s in each]), "reset": zero}
        assert torch.equal(state["exp_avg"], first.get(mode, zero))
        assert torch.equal(state["exp_avg_sq"], second.get(mode, each[-1]["exp_avg_sq"]))
        assert state["step"] == (0 if mode == "reset" else 9)
        assert state["step"].dtype == torch.float32
    for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (sources[-1] / name).read_bytes()
        assert name in made.kept
    assert engine.verify(tmp_path / "out", samples=None).findings == ()


@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_goes_on(run: Path, tmp_path: Path, mode: str) -> None:
    made = init(run, tmp_path / "out", optimizer=mode, before_step=12)
    assert made.resume_command == f'trainer.train(resume_from_checkpoint="{tmp_path / "out"}")'
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out"))
    end = tmp_path / "resumed" / "checkpoint-12"
    rates, losses = logged(end, "learning_rate"), logged(end, "loss")
    assert rates == logged(run / "checkpoint-12", "learning_rate")  # and each step has another
    assert losses[10] == pytest.approx(loss_on(tmp_path / "out", batch(10)), abs=1e-5)
    assert optimizer_state(end)["state"][0]["step"] == (3 if mode == "reset" else 12)


def test_a_merge_of_one_goes_on_to_the_same_weights(run: Path, tmp_path: Path) -> None:
    """Nothing is lost on the way: what the Trainer loads is all that the checkpoint had."""
    init(run, tmp_path / "out", last=1, before_step=12)
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out"))
    expected, found = weights(run / "checkpoint-12"), weights(tmp_path / "resumed" / "checkpoint-12")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_fresh_optimizer_steps_like_a_new_one(run: Path, tmp_path: Path) -> None:
    """After a reset the first update is that of an AdamW without history, at the rate of the step."""
    init(run, tmp_path / "out", optimizer="reset", before_step=12)
    resumed = trainer(tmp_path / "resumed", max_steps=10, save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rate = logged(run / "checkpoint-12", "learning_rate")[10]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    model(input_ids=batch(10), labels=batch(10)).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    found = weights(tmp_path / "resumed" / "checkpoint-10")
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter, atol=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_a_mixture_goes_on_with_its_experts_by_the_command_that_is_printed(
    mixture: Path, tmp_path: Path, mode: str
) -> None:
    made = init(mixture, tmp_path / "out", optimizer=mode, before_step=12)
    assert f'Trainer(model=AutoModelForCausalLM.from_pretrained("{tmp_path / "out"}"' in made.resume_command
    assert any("freshly drawn" in note for note in made.notes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trainer(tmp_path / "resumed", model=model).train(resume_from_checkpoint=str(tmp_path / "out"))
    end = tmp_path / "resumed" / "checkpoint-12"
    assert logged(end, "learning_rate") == logged(mixture / "checkpoint-12", "learning_rate")
    assert logged(end, "loss")[10] == pytest.approx(loss_on(tmp_path / "out", batch(10)), abs=1e-5)


def test_a_checkpoint_in_shards_and_of_bf16(run: Path, tmp_path: Path) -> None:
    for step in (6, 9, 12):
        source, copy = run / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(source, copy)
        (copy / "model.safetensors").unlink()
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        model.save_pretrained(copy, max_shard_size="4KB")
    init(tmp_path / "run", tmp_path / "out", optimizer="average")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    states = [optimizer_state(run / f"checkpoint-{step}")["state"][1] for step in (6, 9, 12)]
    assert torch.equal(
        optimizer_state(tmp_path / "out")["state"][1]["exp_avg"], mean([s["exp_avg"] for s in states])
    )
    assert torch.isfinite(torch.tensor(loss_on(tmp_path / "out", batch(10))))


@pytest.mark.parametrize("purpose", ["sft", "ct"])
def test_another_stage_starts_from_what_a_merge_writes(run: Path, tmp_path: Path, purpose: str) -> None:
    made = init(run, tmp_path / "out", purpose=purpose)
    verbs.merge(Choice(paths=(run,), window=Window(last=3), allow_mixed_phases=True), tmp_path / "merged")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in (tmp_path / "merged").iterdir()}
    assert "optimizer.pt" not in files
    assert "trainer_state.json" not in files
    for name in files - {"pma.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert made.resume_command == f'AutoModelForCausalLM.from_pretrained("{tmp_path / "out"}")'
    assert made.optimizer is None


# ---- killed ----


KILLED = """
import os, signal, sys
from pathlib import Path
from pma import verbs
from pma.engine import building
from pma.trajectory import Window

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

moment, run, out = sys.argv[1:]
how = {}
if moment == "streaming":
    how["progress"] = killed
elif moment == "records":  # files are whole, what completes the checkpoint is not there yet
    building.FolderWriter.finish = killed
else:  # all is written but for the rename
    building.publish = killed
chosen = verbs.Choice(paths=(Path(run),), window=Window(last=3), allow_mixed_phases=True)
verbs.init(chosen, Path(out), optimizer="average", **how)
"""


@pytest.mark.parametrize("moment", ["streaming", "records", "rename"])
def test_what_is_killed_never_looks_complete_and_goes_on(run: Path, tmp_path: Path, moment: str) -> None:
    command = [sys.executable, "-c", KILLED, moment, str(run), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert formats.read_meta(left).incomplete is not None
    init(run, tmp_path / "out", optimizer="average")
    assert not left.exists()
    assert engine.verify(tmp_path / "out", samples=None).findings == ()


def test_another_mode_does_not_go_on_with_an_interrupted_one(run: Path, tmp_path: Path) -> None:
    """Blocks that are done are those of the other mode; the layouts of both are the same."""
    from pma.engine import building, commit

    chosen = Choice(paths=(run,), window=Window(last=3), allow_mixed_phases=True)
    with verbs.plan_init(chosen, optimizer="average") as planned:
        begun = building.Building(planned, tmp_path / "out")
        begun.begin()
        commit.stream(commit.work_of(planned), [begun.output])
        begun.save()
        begun.close()
    with pytest.raises(UsageError, match="its options were not the same"):
        init(run, tmp_path / "out", optimizer="reset")
    init(run, tmp_path / "out", optimizer="average")


def test_runs_and_outputs_in_stores(run: Path, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(run), f"/{tmp_path.name}/run", recursive=True)
    local, url = init(run, tmp_path / "out", optimizer="average"), f"memory://{tmp_path.name}"
    made = init(location(f"{url}/run"), location(f"{url}/out"), optimizer="average")
    assert (made.kept, made.averaged) == (local.kept, local.averaged)
    for path in (tmp_path / "out").iterdir():
        if path.name != "pma.json":
            assert store.cat(f"/{tmp_path.name}/out/{path.name}") == path.read_bytes(), path.name


# ---- bad input ----


def test_no_checkpoint_before_the_step(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--before-step 3: no complete checkpoint .* steps 3, 6, 9, 12"):
        init(run, tmp_path / "out", last=1, before_step=3)
    with pytest.raises(UsageError, match=r"--last 3: there are only 2 .* before step 7: steps 3, 6"):
        init(run, tmp_path / "out", before_step=7)
    chosen = Choice(paths=(run / "checkpoint-3", run / "checkpoint-6"), allow_mixed_phases=True)
    with pytest.raises(UsageError, match="--before-step ends a window"):
        verbs.init(chosen, tmp_path / "out", before_step=7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_weights_alone_cannot_be_gone_on_from(tmp_path: Path, mode: str) -> None:
    tiny_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"stores no optimizer's state.*--for ct"):
        verbs.init(Choice(paths=(tmp_path / "run",), window=Window(last=3)), tmp_path / "out", optimizer=mode)
    assert not (tmp_path / "out").exists()


def test_a_schedule_that_would_begin_anew_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-12" / "scheduler.pt").unlink()
    with pytest.raises(InputError, match=r"no scheduler\.pt.*silently begin its schedule anew"):
        init(tmp_path / "run", tmp_path / "out")


def test_only_averages_need_every_optimizer(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-9" / "optimizer.pt").unlink()
    init(tmp_path / "run", tmp_path / "newest")
    with pytest.raises(MismatchError, match=r"state/0/exp_avg is in .* missing in .*checkpoint-9"):
        init(tmp_path / "run", tmp_path / "average", optimizer="average")


def test_states_of_other_groups_are_not_averaged(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-9" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["param_groups"][0]["params"].reverse()
    torch.save(state, file)
    with pytest.raises(MismatchError, match="in other groups"):
        init(tmp_path / "run", tmp_path / "out", optimizer="average")
    init(tmp_path / "run", tmp_path / "out")


def test_states_of_other_shapes_are_not_averaged(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-9" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].T.contiguous()
    torch.save(state, file)
    with pytest.raises(MismatchError, match=r"state/0/exp_avg in .*checkpoint-9.*shape"):
        init(tmp_path / "run", tmp_path / "out", optimizer="average")


@pytest.mark.parametrize("mode", MODES[1:])
def test_an_optimizer_that_is_not_known_is_only_kept(run: Path, tmp_path: Path, mode: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    for step in (6, 9, 12):
        file = tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt"
        state = torch.load(file, weights_only=True)
        for kept in state["state"].values():
            kept["state1"] = torch.zeros(4, dtype=torch.uint8)  # as 8-bit optimizers have them
        torch.save(state, file)
    with pytest.raises(UsageError, match=r"state1.*--optimizer .* cannot treat it; newest takes it as it is"):
        init(tmp_path / "run", tmp_path / "out", optimizer=mode)
    init(tmp_path / "run", tmp_path / "out")
    assert optimizer_state(tmp_path / "out")["state"][0]["state1"].dtype == torch.uint8


def test_nothing_in_an_optimizers_file_is_executed(run: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    shutil.copytree(run, tmp_path / "run")
    state = optimizer_state(run / "checkpoint-12")
    torch.save({**state, "x": Hostile()}, tmp_path / "run" / "checkpoint-12" / "optimizer.pt")
    (tmp_path / "run" / "checkpoint-12" / "training_args.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match="exec"):
        init(tmp_path / "run", tmp_path / "out")
    shutil.copy(run / "checkpoint-12" / "optimizer.pt", tmp_path / "run" / "checkpoint-12")
    init(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_weights_below_zero_are_not_for_squares(run: Path, tmp_path: Path) -> None:
    options = engine.MergeOptions(weights=(-0.5, 0.5, 1.0))
    with pytest.raises(UsageError, match="zero or more"):
        init(run, tmp_path / "out", optimizer="average", options=options)


def test_a_checkpoint_that_vanishes_while_it_is_merged(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")

    def progress(read: int, written: int) -> None:
        shutil.rmtree(tmp_path / "run" / "checkpoint-6", ignore_errors=True)

    with pytest.raises(MismatchError, match="removed while it was merged"):
        init(tmp_path / "run", tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_mixed_phases_are_refused_as_in_a_merge(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="crosses phases"):
        verbs.init(Choice(paths=(run,), window=Window(last=4)), tmp_path / "out")


def test_an_output_inside_the_run_is_refused_unless_asked_for(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(UsageError, match="--inside-run"):
        init(tmp_path / "run", tmp_path / "run" / "init")
    init(tmp_path / "run", tmp_path / "run" / "init", inside_run=True)


# ---- the command ----


def test_the_command_says_what_was_done_and_how_to_go_on(run: Path, tmp_path: Path) -> None:
    flags = ["--before-step", "12", "--optimizer", "second-moment", "--allow-mixed-phases"]
    shown = CliRunner().invoke(app, ["init", str(run), "-o", str(tmp_path / "a"), *flags])
    assert shown.exit_code == 0
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["averaged", "weights", "(12)"] in lines
    assert ["reset", "exp_avg", "(12)"] in lines
    assert f'trainer.train(resume_from_checkpoint="{tmp_path / "a"}")' in shown.stdout
    shown = CliRunner().invoke(app, ["init", str(run), "-o", str(tmp_path / "b"), *flags, "--json"])
    value = json.loads(shown.stdout)
    assert (value["step"], value["checkpoints"], value["optimizer"]) == (9, 3, "second-moment")
    assert value["reset"] == ["exp_avg (12)"]
    wrong = CliRunner().invoke(app, ["init", str(run), "-o", str(tmp_path / "c"), "--optimizer", "old"])
    assert wrong.exit_code == 2
    assert "expected one of newest, second-moment, average, reset" in wrong.stderr
    wrong = CliRunner().invoke(app, ["init", str(run), "-o", str(tmp_path / "c"), "--for", "rl"])
    assert wrong.exit_code == 2
    assert "expected sft or ct" in wrong.stderr
