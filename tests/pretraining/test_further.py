"""Later stages: another model's weights, a fresh optimizer, another text or responses to prompts."""

import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pma import trajectory, verbs
from pma.engine import MergeOptions
from pma.errors import FormatError, InputError, UsageError
from pma.evaluation import read_documents
from pma.evaluation.model import load_scorer
from pma.evaluation.responses import evaluate_responses, read_exchanges
from pma.pretraining import fork, further, pretrain, resume, run_folder
from pma.pretraining.instructions import InstructionRows
from pma.pretraining.tokens import load_tokens
from pma.trajectory import Window
from pma.types import DType
from pma.verbs import Choice

from .recipes import DENSE, MIXTURE, tiny_recipe, tiny_text

CONTEXT = 16


def weights(checkpoint: Path) -> dict[str, bytes]:
    found = load_file(checkpoint / "model.safetensors").items()
    return {name: tensor.numpy().tobytes() for name, tensor in found}


def history(checkpoint: Path, what: str) -> dict[int, float]:
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[what] for entry in entries if what in entry}


def trained(root: Path, model: dict[str, object]) -> Path:
    pretrain(tiny_recipe(model, steps=8), root / "run", text=[str(tiny_text(root / "text"))])
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("dense"), DENSE)


@pytest.fixture(scope="module", params=[DENSE, MIXTURE], ids=["dense", "mixture"])
def either(run: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run if request.param is DENSE else trained(tmp_path_factory.mktemp("mixture"), MIXTURE)


def other_text(folder: Path) -> list[str]:
    folder.mkdir()
    for number in range(60):
        words = [f"x{number * 31 + i} times {number + i} equals {i * 17}." for i in range(40)]
        (folder / f"{number:03}.txt").write_text(" ".join(words))
    return [str(folder)]


def some_rows(path: Path, count: int = 80) -> list[str]:
    """Short rows, some whose response and some whose prompt is too long, one without a response."""
    rows = []
    for number in range(count):
        prompt, response = f"q{number}?", f"a{number * number}"
        if number % 10 == 3:
            response += " and so on and on" * 4
        if number % 10 == 7:
            prompt += " which is a long question" * 4
        rows.append({"prompt": prompt, "response": response, "source": "made up"})
    rows.append({"prompt": "nothing?", "response": ""})
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    return [str(path)]


def expected_rows(files: list[str], run: Path, stage: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the training rows as they should be, by hand."""
    tokenizer = AutoTokenizer.from_pretrained(run / "text")
    end = tokenizer.eos_token_id
    other = {
        json.loads(line)["prompt"]
        for name in ("held_out", "validation")
        for line in (stage / "text" / f"{name}.jsonl").read_text().splitlines()
    }
    made = []
    for line in lzma.decompress(Path(files[0]).read_bytes()).decode().splitlines():
        row = json.loads(line)
        asked = [end, *tokenizer.encode(row["prompt"] + "\n")]
        answered = [*tokenizer.encode(row["response"]), end]
        if row["prompt"] in other or len(asked) >= CONTEXT or not row["response"]:
            continue
        ids = (asked + answered)[:CONTEXT]
        made.append((ids, ([-100] * len(asked) + answered)[:CONTEXT]))
    return made


def test_prompts_and_padding_carry_no_loss(either: Path, tmp_path: Path) -> None:
    files = some_rows(tmp_path / "rows.jsonl.xz")
    made = further(
        either / "checkpoint-8", tmp_path / "tuned", instructions=files, tokens=2 * 64, learning_rate=1e-3,
        warmup_steps=0, seed=5,
    )  # fmt: skip
    rows = expected_rows(files, either, made.run)
    order = np.random.default_rng([5, 0]).permutation(len(rows))
    model = AutoModelForCausalLM.from_pretrained(either / "checkpoint-8").train()
    nats, count = 0.0, 0
    for index in order[:4]:
        ids, labels = rows[index]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        for position in range(1, len(ids)):
            if labels[position] != -100:
                nats -= float(logits[position - 1].log_softmax(0)[ids[position]])
                count += 1
    logged = history(made.checkpoint, "loss")[1]
    if model.config.model_type == "llama":  # a mixture's loss has a term for balance
        assert logged == pytest.approx(nats / count, abs=2e-4)
    else:
        assert nats / count < logged < nats / count + 0.1


def test_rows_are_read_in_a_fixed_order_and_padded(run: Path, tmp_path: Path) -> None:
    files = some_rows(tmp_path / "rows.jsonl.xz")
    made = further(
        run / "checkpoint-8", tmp_path / "tuned", instructions=files, epochs=1, learning_rate=1e-3,
        warmup_steps=2,
    )  # fmt: skip
    rows = expected_rows(files, run, made.run)
    assert made.step == math.ceil(len(rows) / 4)
    data = InstructionRows(made.run / "text", context_tokens=CONTEXT, count=200, seed=0)
    for epoch in range(2):
        order = np.random.default_rng([0, epoch]).permutation(len(rows))
        for position, index in enumerate(order):
            item = data[epoch * len(rows) + position]
            ids, labels = rows[index]
            assert item["input_ids"][: len(ids)].tolist() == ids
            assert item["labels"].tolist() == labels + [-100] * (CONTEXT - len(labels))
            assert item["attention_mask"].tolist() == [1] * len(ids) + [0] * (CONTEXT - len(ids))
    skipping = InstructionRows(made.run / "text", context_tokens=CONTEXT, count=9, seed=0, skip=(3, 5))
    assert torch.equal(skipping[4]["input_ids"], data[9]["input_ids"])
    assert torch.equal(skipping[2]["input_ids"], data[2]["input_ids"])


def test_rows_that_do_not_fit_are_counted(run: Path, tmp_path: Path) -> None:
    made = further(
        run / "checkpoint-8", tmp_path / "tuned", instructions=some_rows(tmp_path / "rows.jsonl.xz"),
        tokens=64, learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    summary = json.loads((made.run / "text" / "text.json").read_text())
    sides = summary["rows"]
    assert summary["rows_without_room_for_a_response_dropped"] == 8 + 1
    assert sum(sides.values()) + summary["near_duplicates_dropped"] == 72
    assert min(sides.values()) > 0
    assert 0 < summary["training_responses_cut"] <= 8
    assert made.notes[0].startswith(f"{sides['training']} rows to train on")
    assert "9 rows dropped" in made.notes[2]
    assert f"{summary['training_responses_cut']} responses cut at the context's 16" in made.notes[1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_and_falls_as_asked(run: Path, tmp_path: Path, schedule: str) -> None:
    floor = None if schedule == "constant" else 2e-4
    made = further(
        run / "checkpoint-8", tmp_path / "more", text=other_text(tmp_path / "other"), tokens=12 * 64,
        learning_rate=1e-3, final_learning_rate=floor, warmup_steps=4, schedule=schedule,
        checkpoint_every=6 * 64, interval_means=False,
    )  # fmt: skip
    # the log has the rate of the step that comes next, so entry n + 1 is that of the n-th step taken
    found = history(made.checkpoint, "learning_rate")
    shapes = {
        "cosine": lambda x: 2e-4 + 8e-4 * (1 + math.cos(math.pi * x)) / 2,
        "linear": lambda x: 1e-3 - 8e-4 * x,
        "constant": lambda x: 1e-3,
    }
    for step in range(5, 13):
        assert found[step] == pytest.approx(shapes[schedule]((step - 5) / 8)), step
    rising = [found[step] for step in range(1, 6)]
    assert np.allclose(np.diff(rising), np.diff(rising)[0])
    assert rising[0] == pytest.approx(0 if schedule == "constant" else 2e-4)
    points = trajectory.discover([made.run]).points
    assert [(p.step, p.tokens) for p in points] == [(6, 384), (12, 768)]
    assert all(norm > 0 for norm in history(made.checkpoint, "grad_norm").values())
    assert len(history(made.checkpoint, "grad_norm")) == 12


def test_a_stage_starts_from_the_weights_with_a_fresh_optimizer(either: Path, tmp_path: Path) -> None:
    """With almost no rate the weights stay; all of them, experts too; and the moments are of these steps."""
    made = further(
        either / "checkpoint-8", tmp_path / "more", text=other_text(tmp_path / "other"), tokens=64,
        learning_rate=1e-12, warmup_steps=0,
    )  # fmt: skip
    before, after = (
        load_file(path / "model.safetensors") for path in (either / "checkpoint-8", made.checkpoint)
    )
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    state = torch.load(made.checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert {float(each["step"]) for each in state.values()} == {1.0}


def test_a_merge_in_16_bits_is_trained_in_32(run: Path, tmp_path: Path) -> None:
    choice = Choice(paths=(run,), window=Window(last=2))
    verbs.merge(choice, tmp_path / "merged", MergeOptions(dtype=DType.BF16))
    made = further(
        tmp_path / "merged", tmp_path / "more", text=other_text(tmp_path / "other"), tokens=64,
        learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    assert {tensor.dtype for tensor in load_file(made.checkpoint / "model.safetensors").values()} == {
        torch.float32
    }


class Kill(BaseException):
    """Stands in for a signal that nothing catches."""


@pytest.mark.parametrize("what", ["text", "instructions"])
def test_a_killed_stage_goes_on_to_the_same_weights(either: Path, tmp_path: Path, what: str) -> None:
    verbs.init(Choice(paths=(either,), window=Window(last=2)), tmp_path / "init", purpose="ct")
    sources = other_text(tmp_path / "other") if what == "text" else some_rows(tmp_path / "rows.jsonl.xz")

    def stage(out: str, progress=None):
        return further(
            tmp_path / "init", tmp_path / out, **{what: sources}, tokens=8 * 64, learning_rate=1e-3,
            warmup_steps=2, progress=progress, checkpoint_every=3 * 64,
        )  # fmt: skip

    def kill(step: int, last: int, loss: float | None) -> None:
        if step == 5:
            raise Kill

    whole = stage("whole")
    with pytest.raises(Kill):
        stage("killed", kill)
    again = stage("killed")
    assert (again.resumed_from, again.step) == (3, 8)
    assert weights(again.checkpoint) == weights(whole.checkpoint)
    assert history(again.checkpoint, "learning_rate") == history(whole.checkpoint, "learning_rate")
    assert stage("killed").steps_added == 0
    later = resume(whole.run / "checkpoint-6", tmp_path / "resumed")
    assert weights(later.checkpoint) == weights(whole.checkpoint)


def test_text_is_split_in_the_models_own_tokens(run: Path, tmp_path: Path) -> None:
    made = further(
        run / "checkpoint-8", tmp_path / "more", text=other_text(tmp_path / "other"), tokens=64,
        learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    mine, runs = (AutoTokenizer.from_pretrained(path / "text") for path in (made.run, run))
    assert mine.get_vocab() == runs.get_vocab()
    sides = [read_documents([made.run / "text" / f"{side}.txt"]) for side in ("held_out", "validation")]
    held_out = {d.text for side in sides for d in side}
    trained_on = mine.decode(load_tokens(made.run / "text" / "tokens.npy"))
    everything = [path.read_text() for path in (tmp_path / "other").iterdir()]
    assert {text for text in everything if text not in trained_on} == held_out
    record = run_folder.read_record(made.run)
    assert record.stage is not None
    assert record.stage.checkpoint == run / "checkpoint-8"


def test_response_loss_is_what_transformers_makes_of_the_rows(run: Path, tmp_path: Path) -> None:
    files = some_rows(tmp_path / "rows.jsonl.xz", 30)
    scorer = load_scorer(load_file(run / "checkpoint-8" / "model.safetensors"), run / "checkpoint-8")
    found = evaluate_responses("raw", scorer, read_exchanges([Path(files[0])]))
    tokenizer = AutoTokenizer.from_pretrained(run / "text")
    end, number = tokenizer.eos_token_id, 0
    for line in lzma.decompress(Path(files[0]).read_bytes()).decode().splitlines():
        row = json.loads(line)
        asked = [end, *tokenizer.encode(row["prompt"] + "\n")]
        if len(asked) >= CONTEXT or not row["response"]:
            continue
        ids = torch.tensor([(asked + tokenizer.encode(row["response"]) + [end])[:CONTEXT]])
        labels = ids.clone()
        labels[0, : len(asked)] = -100
        with torch.no_grad():
            output = scorer.model(input_ids=ids)
        loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
        assert found.nats[number] / found.tokens[number] == pytest.approx(float(loss), rel=1e-4)
        number += 1
    assert number == len(found.nats) == 27


def test_what_cannot_be_meant(run: Path, tmp_path: Path) -> None:
    text, rows = other_text(tmp_path / "other"), some_rows(tmp_path / "rows.jsonl.xz")
    start, out = run / "checkpoint-8", tmp_path / "out"
    length = {"tokens": 8 * 64, "warmup_steps": 2, "learning_rate": 1e-3}
    for asked, message in (
        ({}, "give one of them"),
        ({"text": text, "instructions": rows}, "give one of them"),
        ({"text": text, "tokens": None}, "in tokens or in epochs"),
        ({"text": text, "epochs": 1.0}, "in tokens or in epochs"),
        ({"text": text, "tokens": None, "epochs": math.nan}, "more than 0"),
        ({"text": text, "schedule": "wsd"}, "expected one of cosine, linear, constant"),
        ({"text": text, "schedule": "constant", "final_learning_rate": 1e-4}, "no other final rate"),
        ({"text": text, "final_learning_rate": 1e-2}, "from 0 to the learning rate"),
        ({"text": text, "warmup_steps": 8}, "fills the whole stage of 8"),
        ({"text": text, "learning_rate": 0.0}, "above 0"),
        ({"text": text, "checkpoint_every": 3}, "less than one step"),
    ):
        with pytest.raises(UsageError, match=message):
            further(start, out, **{**length, **asked})
        assert not out.exists(), message
    with pytest.raises(UsageError, match="no checkpoint of the Trainer"):
        further(run, out, text=text, **length)
    made = further(start, out, text=text, **length)
    with pytest.raises(UsageError, match=r"stage\.schedule: cosine there, linear asked for"):
        further(start, out, text=text, schedule="linear", **length)
    with pytest.raises(UsageError, match=r"stage\.tokens: 512 there"):
        further(start, out, text=text, **{**length, "tokens": 9 * 64})
    with pytest.raises(UsageError, match="later stage with a schedule of its own"):
        fork(made.checkpoint, tmp_path / "fork", anneal="cosine", tokens=64)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 2: has no response that is text"),
        ('{"prompt": 1, "response": "b"}', "line 2: has no prompt that is text"),
        ("[]", "line 2: a JSON list"),
        ("{", "line 2: not valid JSON"),
    ],
)
def test_lines_that_are_no_rows(run: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(FormatError, match=message):
        further(
            run / "checkpoint-8", tmp_path / "out", instructions=[str(tmp_path / "rows.jsonl")], tokens=64,
            learning_rate=1e-3, warmup_steps=0,
        )  # fmt: skip


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no rows"):
        read_exchanges([tmp_path / "empty.jsonl"])
    with pytest.raises(InputError, match="is no file"):
        read_exchanges([tmp_path / "nothing.jsonl"])
