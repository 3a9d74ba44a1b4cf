"""A model that scores text, from tensors: the same code for a checkpoint and for a merge that was never
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pma.errors import InputError, MissingExtra, printable
from pma.evaluation.scoring import Scorer

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_CONTEXT_TOKENS = 2_048


def load_scorer(tensors: Mapping[str, Tensor], like: Path, *, context_tokens: int | None = None) -> Scorer:
    """A transformers model with these `tensors`, configuration and tokenizer from checkpoint `like`.

    Code that a checkpoint brings along is never run. Raises InputError where tensors and configuration do not
    fit.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtra("evaluation", "eval", "transformers") from error
    import torch

    from pma.evaluation.quiet import quiet_transformers

    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(like, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(like, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{like} cannot be evaluated: its configuration or tokenizer is missing or unknown to "
            "transformers "
            f"({printable(str(error))})"
        ) from error
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    model, info = architecture.from_pretrained(
        None, config=config, state_dict=dict(tensors), output_loading_info=True
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if wrong:
        raise InputError(
            f"{like}: its configuration does not fit its tensors, for example {printable(sorted(wrong)[0])}"
        )
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    longest = getattr(config, "max_position_embeddings", None) or _LONGEST_CONTEXT_TOKENS
    return Scorer(
        model=model,
        tokenizer=tokenizer,
        context_tokens=context_tokens or min(int(longest), _LONGEST_CONTEXT_TOKENS),
    )
