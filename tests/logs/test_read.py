"""Logs of every kind, as trainers write them, and as crashes leave them."""

import csv
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from pma.errors import FormatError, InputError, MissingExtra, PmaError, UsageError
from pma.logs import TrainingCurves, read
from pma.logs import rows as rows_module

pytest.importorskip("tensorboard", reason="TensorBoard (extra `train`) writes the event files")

NAN = float("nan")


def entries(steps: range, **more: float) -> list[dict[str, float]]:
    return [{"step": s, "loss": 5 - s / 100, "grad_norm": 1.5, "learning_rate": 1e-3, **more} for s in steps]


def write_state(folder: Path, history: list[dict[str, float]], step: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"global_step": step or history[-1]["step"], "log_history": history}))
    return path


def write_lines(path: Path, rows: list[dict[str, float]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_events(folder: Path, rows: list[dict[str, float]], names: Mapping[str, str], **how: bool) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for row in rows:
        for quantity, name in names.items():
            if quantity in row:
                writer.add_scalar(name, row[quantity], int(row["step"]), **how)
    writer.close()
    return max(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)


HF_TAGS = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate"}


def same(curves: TrainingCurves, rows: list[dict[str, float]], rel: float = 1e-12) -> None:
    assert curves.steps.tolist() == [row["step"] for row in rows]
    for quantity in ("loss", "grad_norm", "learning_rate"):
        expected = [row.get(quantity, NAN) for row in rows]
        np.testing.assert_allclose(getattr(curves, quantity), expected, rtol=rel)


# ---- one log of each kind ----


def test_a_trainer_state_alone_in_a_checkpoint_and_in_a_run(tmp_path: Path) -> None:
    write_state(tmp_path / "run" / "checkpoint-50", entries(range(5, 51, 5)))
    newest = write_state(tmp_path / "run" / "checkpoint-100", entries(range(5, 101, 5)))
    for path in (newest, newest.parent, tmp_path / "run"):
        curves = read(path)
        same(curves, entries(range(5, 101, 5)))
        assert curves.sources == (newest,)
        assert curves.notes == ()


def test_the_summary_at_the_end_of_a_trainer_state_is_no_loss(tmp_path: Path) -> None:
    history = [*entries(range(1, 11)), {"step": 10, "train_loss": 77.0, "train_runtime": 3.0}]
    history.insert(5, {"step": 5, "eval_loss": 88.0})
    same(read(write_state(tmp_path, history)), entries(range(1, 11)))


@pytest.mark.parametrize("new_style", [False, True], ids=["simple values", "tensors"])
def test_tensorboard_event_files(tmp_path: Path, new_style: bool) -> None:
    rows = entries(range(1, 40))
    path = write_events(
        tmp_path / "tb", [{**row, "eval": 9} for row in rows], HF_TAGS | {"eval": "eval/loss"}
    )
    if new_style:
        shutil.rmtree(tmp_path / "tb")
        path = write_events(tmp_path / "tb", rows, HF_TAGS, new_style=True)
    for where in (path, tmp_path / "tb"):
        curves = read(where)
        same(curves, rows, rel=1e-6)  # they hold 32-bit numbers
        assert curves.sources == (path,)


def test_tensorboard_agrees_with_its_own_accumulator(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"step": s, "loss": math.sin(s) + 3} for s in range(200)]
    write_events(tmp_path, rows, {"loss": "loss_metrics/global_avg_loss"})
    theirs = EventAccumulator(str(tmp_path)).Reload().Scalars("loss_metrics/global_avg_loss")
    ours = read(tmp_path)
    assert [(e.step, e.value) for e in theirs] == list(zip(ours.steps, ours.loss, strict=True))


COLUMNS = [  # as these trainers name them
    ("step", "loss", "grad_norm", "learning_rate"),
    ("global_step", "train_loss", "gradient_norm", "lr"),
    ("iteration", "lm loss", "grad-norm", "learning-rate"),
    ("iter", "train/loss", "train/grad_norm", "train/lr"),
    ("Iteration", "train/CE loss", "optim/total grad norm", "optim/LR (group 0)"),
    ("step", "train_loss_step", "grad_norm_total", "lr-AdamW"),
]


@pytest.mark.parametrize("names", COLUMNS, ids=lambda names: names[1])
def test_json_lines_and_csv_by_the_usual_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    plain = ("step", "loss", "grad_norm", "learning_rate")
    rows = entries(range(2, 60, 2))
    renamed = [{new: row[old] for old, new in zip(plain, names, strict=True)} for row in rows]
    same(read(write_lines(tmp_path / "log.jsonl", renamed)), rows)
    same(read(write_csv(tmp_path / "log.csv", renamed)), rows)


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    rows = [{"t": s, "objective": 3.0 + s, "step": -1} for s in range(5)]
    path = write_lines(tmp_path / "log.jsonl", rows)
    with pytest.raises(FormatError, match=r"there are t, objective, step.*--loss-name"):
        read(path)
    curves = read(path, names={"step": "t", "loss": "objective"})
    assert (curves.steps.tolist(), curves.loss.tolist()) == ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7])
    with pytest.raises(UsageError, match="no column 'nothing'"):
        read(path, names={"step": "t", "loss": "nothing"})
    with pytest.raises(UsageError, match="'speed' is no quantity"):
        read(path, names={"speed": "t"})


def test_the_bare_name_wins_over_the_same_name_in_a_group(tmp_path: Path) -> None:
    rows = [{"step": s, "train/train_loss": 9.0, "loss": 1.0, "train/loss": 8.0} for s in range(4)]
    assert read(write_lines(tmp_path / "log.jsonl", rows)).loss.tolist() == [1.0] * 4


def test_csv_with_semicolons_tabs_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    for name, text in (
        ("a.csv", "step;loss\n1;3.5\n2;3.25\n"),
        ("b.csv", "step\tloss\n1\t3.5\n2\t3.25\n"),
        ("c.csv", '\ufeff"step","loss"\r\n"1","3.5"\r\n"2","3.25"\r\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read(tmp_path / name).loss.tolist() == [3.5, 3.25]


# ---- what crashes leave ----


def test_after_a_restart_the_later_written_counts(tmp_path: Path) -> None:
    dead = [{"step": s, "loss": 100.0} for s in range(50, 80)]
    alive = entries(range(50, 61))
    expected = entries(range(1, 61))
    everything = [*entries(range(1, 50)), *dead, *alive]
    for path in (
        write_lines(tmp_path / "a" / "log.jsonl", everything),
        write_csv(
            tmp_path / "b" / "log.csv",
            [{"step": 0, "grad_norm": "", "learning_rate": "", **r} for r in everything],
        ),
        write_events(tmp_path / "c", everything, HF_TAGS),
        write_state(tmp_path / "d", everything),
    ):
        curves = read(path)
        same(curves, expected, rel=1e-6)
        assert any("steps go back 1 times (from 79 to 50)" in text for text in curves.notes)


def test_event_files_of_several_starts_are_one_log(tmp_path: Path) -> None:
    """The Trainer begins a folder of its own at each start; names need not be in order of time."""
    import time

    write_events(tmp_path / "runs" / "z-first", [{"step": s, "loss": 9.0} for s in range(30)], HF_TAGS)
    time.sleep(0.01)
    write_events(tmp_path / "runs" / "a-second", [{"step": s, "loss": 2.0} for s in range(20, 25)], HF_TAGS)
    curves = read(tmp_path)
    assert curves.steps.tolist() == list(range(25))
    assert curves.loss.tolist() == [9.0] * 20 + [2.0] * 5
    assert len(curves.sources) == 2


def test_numbers_strings_and_what_is_no_number(tmp_path: Path) -> None:
    text = (
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": "3.5"}\n{"step": 3, "loss": Infinity}\n'
        '{"step": 4, "loss": "nan"}\n{"step": 5, "loss": "broken"}\n{"step": 6, "loss": null}\n'
        '{"step": 7, "loss": [1]}\n{"step": "8", "loss": 2}\n{"step": 9.5, "loss": 2}\n'
        '{"step": -1, "loss": 2}\n{"step": 1e300, "loss": 2}\n{"loss": 2}\n{"step": 10, "loss": true}\n'
        f'{{"step": 11, "loss": {"9" * 400}}}\n{{"step": {2**70}, "loss": 1}}\n'
        '{"step": 12, "grad_norm": 1}\n'
    )
    (tmp_path / "log.jsonl").write_text(text)
    curves = read(tmp_path / "log.jsonl")
    assert curves.steps.tolist() == [1, 2, 3, 4, 8, 12]
    steps, loss = curves.series("loss")
    assert steps.tolist() == [1, 2, 3, 4, 8]  # a NaN that was logged is there, one that was not is not
    assert str(loss.tolist()) == "[nan, 3.5, inf, nan, 2.0]"
    assert "5 rows without a whole number as step were left out" in curves.notes
    assert "4 values that are no numbers were left out" in curves.notes


def test_gaps_and_duplicates_are_told(tmp_path: Path) -> None:
    rows = [*entries(range(1, 50)), *entries(range(200, 240)), {"step": 239, "loss": 1.0}]
    curves = read(write_lines(tmp_path / "log.jsonl", rows))
    assert curves.loss[-1] == 1.0
    assert "1 steps were logged twice; the later written values are taken" in curves.notes
    assert "1 gap without entries, the first between steps 49 and 200" in curves.notes


def test_a_last_line_that_is_cut_is_left_out(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "log.jsonl", entries(range(1, 20)))
    lines.write_text(lines.read_text()[:-20])
    curves = read(lines)
    assert int(curves.steps[-1]) == 18
    assert curves.notes == ("the last line of log.jsonl is cut short and was left out",)
    table = write_csv(tmp_path / "log.csv", [{"step": s, "loss": 2.125} for s in range(1, 20)])
    table.write_bytes(table.read_bytes()[:-4])  # 2.125 became 2.1
    curves = read(table)
    assert int(curves.steps[-1]) == 18
    assert curves.loss.tolist() == [2.125] * 18


@pytest.mark.parametrize("cut", [1, 3, 9, 15, 30])
def test_an_event_file_that_is_cut_is_read_up_to_there(tmp_path: Path, cut: int) -> None:
    path = write_events(tmp_path, entries(range(1, 20)), {"loss": "loss"})
    os.truncate(path, path.stat().st_size - cut)
    curves = read(path)
    assert curves.steps.tolist() == list(range(1, 19))
    assert f"{path.name} is cut short or damaged at its end; it was read up to there" in curves.notes


def test_a_flipped_bit_in_an_event_file_ends_it(tmp_path: Path) -> None:
    path = write_events(tmp_path, entries(range(1, 100)), {"loss": "loss"})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    curves = read(path)
    assert 40 < len(curves.steps) < 60
    assert any("cut short or damaged" in text for text in curves.notes)


# ---- bad input ----


def hostile_events(path: Path, length: int) -> None:
    """A record that says it is `length` bytes long, its header's checksum right."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    header = struct.pack("<Q", length)
    path.write_bytes(header + struct.pack("<I", masked_crc32c(header)) + b"x" * 10)


def test_an_event_that_claims_to_be_huge_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.host"
    hostile_events(path, 2**62)
    with pytest.raises(FormatError, match="holds no training log"):
        read(path)


def test_pictures_and_texts_in_event_files_are_passed_over(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    writer.add_text("loss", "x" * 100_000, 1)
    writer.add_text("notes", "short", 1)
    writer.add_histogram("grads", np.arange(100.0), 1)
    writer.add_scalar("loss", 2.5, 2)
    writer.close()
    curves = read(tmp_path)
    assert (curves.steps.tolist(), curves.loss.tolist()) == ([2], [2.5])


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv", "trainer_state.json", "events.out.tfevents.1.h"])
def test_an_empty_file_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(FormatError, match=r"empty|not valid JSON|holds no training log"):
        read(tmp_path / name)


BAD_TEXTS = {
    "log.jsonl": ["[1, 2]\n[3]\n", "no json\nat all\n", "[" * 100_000 + "\n", '{"a": 1}\n', "\x00\x01\x02\n"],
    "log.csv": ["loss\n1\n", "step,step,loss\n1,1,2\n", "a,b\n1,2\n", 'step,loss\n1,"2\n', "\x00\n\x00\n"],
    "trainer_state.json": ["{}", "[]", '{"log_history": 5}', '{"log_history": [3, null]}', '{"a":'],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name, texts in BAD_TEXTS.items() for text in texts],
    ids=lambda t: t[:20],
)
def test_what_is_no_log_is_a_clear_error(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=name):
        read(tmp_path / name)


def test_a_log_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "LARGEST_LOG_BYTES", 100)
    with pytest.raises(FormatError, match="more than 100 is not read"):
        read(write_lines(tmp_path / "log.jsonl", entries(range(1, 20))))


def test_names_from_a_log_are_escaped(tmp_path: Path) -> None:
    write_lines(tmp_path / "log.jsonl", [{"step\x1b[31m": 1, "x": 2}])
    with pytest.raises(FormatError) as caught:
        read(tmp_path / "log.jsonl")
    assert "\x1b" not in str(caught.value)


def test_missing_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no training log: looked for"):
        read(tmp_path)
    (tmp_path / "log.txt").write_text("step 1 loss 2")
    with pytest.raises(UsageError, match="no log of a kind that is known"):
        read(tmp_path / "log.txt")


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_events(tmp_path / "tb", entries(range(1, 9)), HF_TAGS)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(MissingExtra, match=r"pma-llm\[train\]"):
        read(path)
    write_state(tmp_path / "checkpoint-5", entries(range(1, 6)))  # another log serves, and it is told
    curves = read(tmp_path)
    assert int(curves.steps[-1]) == 5
    assert any("pma-llm[train]" in text for text in curves.notes)


# ---- which log of a run ----


def test_of_several_logs_the_one_that_reaches_furthest(tmp_path: Path) -> None:
    state = write_state(tmp_path / "checkpoint-20", entries(range(1, 21)))
    assert read(tmp_path).sources == (state,)
    events = write_events(tmp_path / "tensorboard", entries(range(1, 28)), HF_TAGS)
    assert read(tmp_path).sources == (events,)
    lines = write_lines(tmp_path / "logs" / "train.jsonl", entries(range(1, 35)))
    curves = read(tmp_path)
    assert curves.sources == (lines,)
    assert f"{state} reaches step 20 only" in curves.notes
    write_lines(tmp_path / "sft.jsonl", [{"prompt": "x", "response": "y"}])  # another kind of table
    write_lines(tmp_path / "checkpoint-20" / "log.jsonl", entries(range(1, 99)))  # a checkpoint's own affair
    write_lines(tmp_path / ".hidden" / "log.jsonl", entries(range(1, 99)))
    assert read(tmp_path).sources == (lines,)


def test_a_state_that_is_being_written_is_passed_over(tmp_path: Path) -> None:
    good = write_state(tmp_path / "checkpoint-20", entries(range(1, 21)))
    cut = write_state(tmp_path / "checkpoint-30", entries(range(1, 31)))
    cut.write_text(cut.read_text()[:100])
    curves = read(tmp_path)
    assert curves.sources == (good,)
    assert any("passed over" in text and "checkpoint-30" in text for text in curves.notes)


def test_a_lineage_that_was_restarted_is_not_the_runs_log(tmp_path: Path) -> None:
    first = entries(range(1, 41))
    write_state(tmp_path / "checkpoint-20", first[:20])
    dead = write_state(tmp_path / "checkpoint-40", first)
    alive = write_state(tmp_path / "checkpoint-30", [*first[:20], *entries(range(21, 31), loss=2.0)])
    os.utime(dead, ns=(1, 1))
    curves = read(tmp_path)
    assert curves.sources == (alive,)
    assert curves.loss[-1] == 2.0
    assert "checkpoint-40 is of a lineage that was restarted, and was left out" in curves.notes


def test_any_error_is_ours(tmp_path: Path) -> None:
    """Bytes of any kind under any log's name: read, or refused in words."""
    random = np.random.default_rng(0)
    good = {
        "log.jsonl": write_lines(tmp_path / "a" / "log.jsonl", entries(range(1, 40))).read_bytes(),
        "log.csv": write_csv(tmp_path / "b" / "log.csv", entries(range(1, 40))).read_bytes(),
        "trainer_state.json": write_state(tmp_path / "c", entries(range(1, 40))).read_bytes(),
        "events.out.tfevents.1.h": write_events(tmp_path / "d", entries(range(1, 40)), HF_TAGS).read_bytes(),
    }
    for name, data in good.items():
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(int(random.integers(1, 20))):
                broken[int(random.integers(len(broken)))] = int(random.integers(256))
            (tmp_path / name).write_bytes(broken[: int(random.integers(1, len(broken) + 1))])
            try:
                read(tmp_path / name)
            except PmaError:
                continue
