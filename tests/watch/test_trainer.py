"""A real transformers Trainer that keeps two checkpoints, a real model, the window kept by hard links."""

from pathlib import Path
from typing import Any

from pma.evaluation.measures import text_measure
from pma.evaluation.text import Document
from pma.results import Store
from pma.testing import tiny_llama_run
from pma.trajectory import KEPT_FOLDER, Growing
from pma.watch import Judge, Keeper, Wanted, Watch


def test_a_trainer_that_rotates_its_checkpoints(tmp_path: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
    )
    from transformers.trainer_callback import PrinterCallback

    [start] = tiny_llama_run(tmp_path / "start", steps=1)
    run = tmp_path / "run"
    run.mkdir()
    documents = [Document(name=str(i), text=f"Sentence {i} says that {i} is {i}.") for i in range(4)]
    watch = Watch(
        Growing(run),
        Wanted(last=3),
        Judge(measures=[text_measure(documents, cloze=0, context_tokens=None)]),
        Store(run / ".pma" / "results.sqlite"),
        keeper=Keeper(run, run / KEPT_FOLDER),
    )

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_save(self, *_: Any, **__: Any) -> None:
            while watch.look():
                pass

    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = [{"input_ids": tokenizer.encode("a few words to learn"[:16])} for _ in range(8)]
    data = [{"input_ids": torch.tensor(r["input_ids"]), "labels": torch.tensor(r["input_ids"])} for r in rows]
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(start),
        args=TrainingArguments(
            output_dir=str(run),
            max_steps=6,
            per_device_train_batch_size=2,
            save_steps=1,
            save_total_limit=2,
            logging_steps=1,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            include_num_input_tokens_seen="all",
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[Look()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert [(point.step, point.window) for point in watch.history.alive] == [
        (1, ()),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (4, (2, 3, 4)),
        (5, (3, 4, 5)),
        (6, (4, 5, 6)),
    ]
    losses = [point.values["loss_last"] for point in watch.history.alive]
    assert len(set(losses)) == 6
