"""The corpus: split without overlap, near-duplicates removed; tokens packed in a fixed order; recipes."""

import itertools
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from pma.errors import InputError, UsageError
from pma.evaluation import Document
from pma.pretraining import load_recipe
from pma.pretraining.corpus import load_corpus, standard_library, without_near_duplicates
from pma.pretraining.recipe import from_tables
from pma.pretraining.tokens import PackedSequences, encode_documents, train_tokenizer

from .recipes import tiny_recipe, tiny_text

DATA = Path(__file__).parents[3] / "shared" / "data"
BUILT_IN = ("nano-dense", "nano-moe", "micro-dense", "micro-moe", "small-dense", "small-moe")


def words(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+|[^\w\s]+", text)
    return set(zip(*(found[i:] for i in range(5)), strict=False))


def test_the_default_corpus_is_split_without_overlap() -> None:
    corpus = load_corpus([])
    sides = (corpus.training, corpus.validation, corpus.held_out)
    assert min(len(side) for side in sides) >= 5
    for one, other in itertools.combinations(sides, 2):
        assert not {d.group for d in one} & {d.group for d in other}
    assert corpus == load_corpus([])
    assert sum(len(d.text) for d in corpus.training) > 4_000_000


def test_held_out_documents_have_no_near_duplicate_in_training() -> None:
    """Exact Jaccard similarities, for every pair, against what the sketches estimated."""
    corpus = load_corpus([])
    training = [words(d.text) for d in corpus.training]
    for document in corpus.held_out:
        mine = words(document.text)
        assert max(len(mine & other) / max(len(mine | other), 1) for other in training) < 0.8, document.name


def test_the_default_leaves_tests_and_tables_out() -> None:
    names = [d.name for d in standard_library()]
    assert not [n for n in names if n.startswith(("test/", "encodings/", "pydoc_data/", "site-packages/"))]


def test_near_duplicates_go_and_others_stay() -> None:
    random = np.random.default_rng(0)
    base = [" ".join(f"w{w}" for w in random.integers(0, 500, 300)) for _ in range(5)]
    changed = " ".join([*base[0].split()[:7], "changed", *base[0].split()[8:]])
    documents = [
        Document(name=str(i), text=t)
        for i, t in enumerate([*base, changed, base[2], "short one", "short two"])
    ]
    assert [d.name for d in without_near_duplicates(documents)] == ["0", "1", "2", "3", "4", "7", "8"]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one document " * 50)
    with pytest.raises(InputError, match="too few"):
        load_corpus([tmp_path / "one.txt"])


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared study data is not beside this checkout")
def test_separated_and_packed_text_of_others() -> None:
    corpus = load_corpus([DATA / "ct_math.txt.xz"])
    assert len(corpus.held_out) >= 2


def test_every_token_is_read_once_an_epoch_in_an_order_of_its_own() -> None:
    tokens = np.arange(103, dtype=np.uint32)
    data = PackedSequences(tokens, context_tokens=10, count=25, seed=3)
    epochs = [
        np.sort(np.concatenate([data[e * 10 + i]["input_ids"].numpy() for i in range(10)])) for e in (0, 1)
    ]
    for epoch in epochs:
        np.testing.assert_array_equal(epoch, np.arange(100))
    assert [int(data[i]["input_ids"][0]) for i in range(10)] != [
        int(data[10 + i]["input_ids"][0]) for i in range(10)
    ]
    again = PackedSequences(tokens, context_tokens=10, count=99, seed=3)
    np.testing.assert_array_equal(again[17]["input_ids"], data[17]["input_ids"])


def test_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(InputError, match="less than one sequence"):
        PackedSequences(np.arange(5, dtype=np.uint32), context_tokens=10, count=1, seed=0)


def test_the_tokenizer_reproduces_any_text(tmp_path: Path) -> None:
    from pma.evaluation import read_documents

    documents = read_documents([tiny_text(tmp_path)])
    tokenizer = train_tokenizer(documents, 300)
    text = "Any text: naïve — 漢字 \t\n and word7"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = encode_documents(tokenizer, documents)
    assert (tokens == tokenizer.eos_token_id).sum() == len(documents)
    assert tokens.max() < 300


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes_are_models_that_transformers_knows(name: str) -> None:
    from transformers import AutoConfig

    recipe = load_recipe(name)
    settings = dict(recipe.model)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    for key, value in settings.items():
        assert getattr(config, key) == value
    assert ("moe" in name) == (recipe.model["model_type"] == "olmoe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("extra = 1", "extra is unknown"),
        ('[run]\ntokens = "8Q"', "'8Q'"),
        ("[optimizer]\nlearning_rate = true", "learning_rate is True"),
        ('[optimizer]\nlearning_rate = "fast"', "learning_rate is 'fast'"),
        ("[text]\nvocabulary_tokens = 300\ncontext = 5", "context is unknown"),
        ("[text]\nvocabulary_tokens = 300", "context_tokens is missing"),
        ("[model]\nhidden_size = 4", "model_type"),
        ('[run]\nprecision = "float4"', "float4"),
        ("[run]\nmicro_batch_sequences = 3", "multiple"),
        ("[run]\ntokens = 5", "less than one step"),
    ],
)
def test_recipes_that_cannot_be(change: str, message: str) -> None:
    tables = tiny_recipe().to_json()
    for key, value in tomllib.loads(change).items():
        if key in ("text", "model"):
            tables[key] = value
        else:
            tables[key] = {**tables[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UsageError, match=message):
        from_tables(tables, "test")


def test_a_recipe_goes_out_and_back() -> None:
    recipe = load_recipe("small-moe")
    assert from_tables(recipe.to_json(), "again") == recipe


def test_a_recipe_that_is_not_toml(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_recipe(str(tmp_path / "bad.toml"))
