"""The model of a recipe: new, or a checkpoint's, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pma.errors import InputError, MissingExtra, UsageError, printable
from pma.evaluation.quiet import quiet_transformers
from pma.pretraining.recipe import Recipe


def check_model(recipe: Recipe) -> None:
    """Raises UsageError for a model that transformers cannot build, before anything is written."""
    try:
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("pre-training", "train", str(error.name)) from error
    quiet_transformers()
    try:
        known = AutoConfig.for_model(recipe.model["model_type"])
        for name in recipe.model:
            if not hasattr(known, name):
                raise UsageError(
                    f"recipe {recipe.name}: [model] {name} is unknown to {recipe.model['model_type']}"
                )
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(_config(recipe, end_of_text=0))
    except (StrictDataclassError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"recipe {recipe.name}: transformers cannot build its model: {printable(str(error))}"
        ) from error


def _config(recipe: Recipe, end_of_text: int) -> Any:
    from transformers import AutoConfig

    settings = dict(recipe.model)
    return AutoConfig.for_model(
        settings.pop("model_type"),
        **settings,
        vocab_size=recipe.text.vocabulary_tokens,
        max_position_embeddings=recipe.text.context_tokens,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,
        use_cache=False,
    )


def build_model(recipe: Recipe, tokenizer: Any, checkpoint: Path | None) -> Any:
    """A new model, or the checkpoint's.

    The Trainer's own resume is not enough: transformers 5 stores a mixture's experts one by one but holds
    them fused, and the Trainer loads by name, not strictly, so a resumed mixture would silently keep freshly
    drawn experts.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    config = _config(recipe, tokenizer.eos_token_id)
    set_seed(recipe.run.seed)
    if checkpoint is None:
        return AutoModelForCausalLM.from_config(config)
    # a merge may be stored in 16 bits; weights are trained in 32
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise InputError(
            f"{checkpoint} does not fit the run's recipe, for example {printable(str(wrong[0]))}"
        )
    return model
