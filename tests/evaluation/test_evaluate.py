"""Losses against a token-by-token computation; one code for checkpoints and unwritten merges; cloze items."""

import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pma import verbs
from pma.errors import InputError
from pma.evaluation import Document, read_documents, write_documents
from pma.evaluation import cloze as cloze_module
from pma.evaluation.cloze import CONTEXT_CHARACTERS, cloze_correct, cloze_items
from pma.evaluation.compare import compare
from pma.evaluation.evaluate import Evaluation, evaluate, loss_difference
from pma.evaluation.model import load_scorer
from pma.evaluation.scoring import Scorer, continuation_nats, document_losses
from pma.testing import tiny_llama_run
from pma.trajectory import Window
from pma.verbs import Candidate, Choice

TEXTS = [f"Document {i} says {'so much ' * (3 * i + 5)}and {i * i} more; then it stops." for i in range(6)]
DOCUMENTS = [
    Document(name=str(i), text=text + "".join(f" {i}.{j} then {j * i + j};" for j in range(60)))
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "run"
    tiny_llama_run(folder, steps=3)
    return folder


def scorer_of(path: Path, **options: int) -> Scorer:
    return load_scorer(verbs.average(Choice(paths=(path,))), path, **options)


def test_losses_equal_a_token_by_token_computation(run: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10", context_tokens=16)
    nats, tokens = document_losses(scorer, TEXTS)
    for d, text in enumerate(TEXTS):
        ids = [scorer.start_token, *scorer.encode(text)]
        total = 0.0
        for position in range(1, len(ids)):
            window_start = (position - 1) // 16 * 16
            with torch.no_grad():
                logits = scorer.model(input_ids=torch.tensor([ids[window_start:position]])).logits[0, -1]
            total -= float(torch.log_softmax(logits.double(), 0)[ids[position]])
        assert nats[d] == pytest.approx(total, rel=1e-5)
        assert tokens[d] == len(ids) - 1


def test_a_uniform_model_has_the_entropy_of_its_vocabulary(run: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10")
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.zero_()
    result = evaluate("uniform", scorer, DOCUMENTS, cloze=0)
    assert result.loss.value == pytest.approx(math.log(96), rel=1e-6)
    # the tokenizer has one token a character, and the text one byte a character
    assert result.bits_per_byte == pytest.approx(math.log2(96), rel=1e-6)
    assert result.cloze_accuracy is None


def test_continuations_are_conditional(run: Path) -> None:
    """-log p(b | a) = -log p(ab) + log p(a), as long as both fit into one window."""
    scorer = scorer_of(run / "checkpoint-10")
    both, _ = document_losses(scorer, ["hello world"])
    first, _ = document_losses(scorer, ["hello"])
    conditional = continuation_nats(scorer, [("hello", " world")])
    assert conditional[0] == pytest.approx(both[0] - first[0], rel=1e-5)


def test_a_long_context_loses_its_beginning(run: Path) -> None:
    scorer = scorer_of(run / "checkpoint-10", context_tokens=8)
    assert continuation_nats(scorer, [("x" * 100 + "abcde", "fgh")])[0] == pytest.approx(
        continuation_nats(scorer, [("yyyyabcde"[-9:], "fgh")])[0], rel=0.2
    )
    assert np.isfinite(continuation_nats(scorer, [("a", "b" * 100)])).all()


def test_an_unwritten_merge_evaluates_as_the_written_one(run: Path, tmp_path: Path) -> None:
    choice = Choice(paths=(run,), window=Window(last=3))
    verbs.merge(choice, tmp_path / "merged")
    written, unwritten = verbs.evaluate(
        [
            Candidate(name="w", choice=Choice(paths=(tmp_path / "merged",))),
            Candidate(name="u", choice=choice),
        ],
        DOCUMENTS,
        cloze=20,
    )
    assert written.nats == unwritten.nats
    assert written.cloze == unwritten.cloze
    difference = loss_difference(written, unwritten)
    assert (difference.value, difference.standard_error) == (0.0, 0.0)


def test_a_table_of_models(run: Path) -> None:
    names = ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    evaluations = verbs.evaluate(
        [Candidate(name=n, choice=Choice(paths=(run / n,))) for n in names], DOCUMENTS, cloze=20
    )
    first, second, annealed = compare(evaluations, evaluations[2])
    assert first.improvement is None
    assert second.improvement is not None
    assert second.improvement.value == pytest.approx(first.loss.value - second.loss.value)
    assert annealed.gain_recovered is None
    assert Evaluation.from_json(json.loads(json.dumps(evaluations[0].to_json()))) == evaluations[0]


def test_other_text_cannot_be_paired(run: Path) -> None:
    candidate = Candidate(name="a", choice=Choice(paths=(run / "checkpoint-10",)))
    one = verbs.evaluate([candidate], DOCUMENTS, cloze=0)[0]
    other = verbs.evaluate([candidate], DOCUMENTS[:-1], cloze=0)[0]
    with pytest.raises(InputError, match="not evaluated on the same text"):
        loss_difference(one, other)


def test_tensors_that_do_not_fit_the_configuration(run: Path) -> None:
    tensors = verbs.average(Choice(paths=(run / "checkpoint-10",)))
    tensors.pop("model.norm.weight")
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load_scorer(tensors, run / "checkpoint-10")


def test_code_in_a_checkpoint_is_never_run(run: Path, tmp_path: Path) -> None:
    import shutil

    hostile = tmp_path / "checkpoint-10"
    shutil.copytree(run / "checkpoint-10", hostile)
    canary = tmp_path / "canary"
    (hostile / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((hostile / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {n: f"modeling_evil.{n}" for n in ("AutoConfig", "AutoModelForCausalLM")},
    }
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be evaluated"):
        scorer_of(hostile)
    assert not canary.exists()


# ---- cloze ----


def test_cloze_items_are_made_of_true_and_foreign_continuations() -> None:
    items = cloze_items(DOCUMENTS, 50)
    assert items == cloze_items(DOCUMENTS, 50)
    assert items != cloze_items(DOCUMENTS, 50, seed=1)
    for item in items:
        text = DOCUMENTS[item.document].text
        assert item.context + item.choices[item.answer] in text
        assert len(item.context) <= CONTEXT_CHARACTERS
        assert len(item.choices) == 4
    assert {item.answer for item in items} == {0, 1, 2, 3}


def test_cloze_counts_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    items = cloze_items(DOCUMENTS, 40)
    true = [choice == item.choices[item.answer] for item in items for choice in item.choices]
    monkeypatch.setattr(cloze_module, "continuation_nats", lambda scorer, pairs: np.where(true, 1.0, 9.0))
    assert cloze_correct(None, items).all()  # type: ignore[arg-type]
    monkeypatch.setattr(cloze_module, "continuation_nats", lambda scorer, pairs: np.where(true, 9.0, 1.0))
    assert not cloze_correct(None, items).any()  # type: ignore[arg-type]


def test_cloze_needs_four_documents() -> None:
    with pytest.raises(InputError, match="four documents"):
        cloze_items(DOCUMENTS[:3])


# ---- text ----


def test_documents_go_out_and_back(tmp_path: Path) -> None:
    write_documents(tmp_path / "all.txt", DOCUMENTS)
    assert [d.text for d in read_documents([tmp_path / "all.txt"])] == [d.text for d in DOCUMENTS]
    packed = tmp_path / "all.txt.xz"
    packed.write_bytes(lzma.compress((tmp_path / "all.txt").read_bytes()))
    assert [d.text for d in read_documents([packed])] == [d.text for d in DOCUMENTS]


def test_folders_are_read_in_order_and_hidden_files_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert [d.text for d in read_documents([tmp_path])] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b""])
def test_what_is_not_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"not UTF-8|holds no text"):
        read_documents([tmp_path])
    (tmp_path / "x.xz").write_bytes(b"not xz")
    with pytest.raises(InputError, match=r"in \.xz"):
        read_documents([tmp_path / "x.xz"])


def test_documents_that_are_all_alike_make_no_cloze() -> None:
    with pytest.raises(InputError, match="too much alike"):
        cloze_items([Document(name=str(i), text="a" * 500) for i in range(5)])


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"vocab_size": 5},
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
        {"model_type": "t5"},
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error(
    run: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    import shutil

    other = tmp_path / "checkpoint-10"
    shutil.copytree(run / "checkpoint-10", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=r"does not fit|cannot be evaluated"):
        scorer_of(other)
