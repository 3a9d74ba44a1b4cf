"""Recipes and text small enough to train in seconds."""

from pathlib import Path

from pma.pretraining.recipe import OptimizerRecipe, Recipe, RunRecipe, TextRecipe

DENSE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MIXTURE = {
    **DENSE,
    "model_type": "olmoe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}


def tiny_recipe(model: dict[str, object] = DENSE, steps: int = 12, **run: int) -> Recipe:
    """Four sequences of 16 tokens a step, a checkpoint every 4 steps, 3 steps of warmup."""
    return Recipe(
        name="tiny",
        model=model,
        text=TextRecipe(vocabulary_tokens=300, context_tokens=16),
        optimizer=OptimizerRecipe(learning_rate=1e-2, warmup_steps=3),
        run=RunRecipe(
            tokens=steps * 64, checkpoint_every_tokens=4 * 64, batch_sequences=4, log_every_steps=1, **run
        ),
    )


def tiny_text(folder: Path, documents: int = 40) -> Path:
    """Documents of made-up sentences, each of its own words."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = [f"word{number * 7 + i % 50} is {i * number} and" for i in range(60)]
        (folder / f"{number:03}.txt").write_text(" ".join(words))
    return folder
