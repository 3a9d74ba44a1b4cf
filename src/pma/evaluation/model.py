"""A model that scores text, from tensors: the same code for a checkpoint and for a merge that was never
written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pma.errors import InputError, MissingExtra, printable
from pma.evaluation.scoring import Scorer
from pma.formats.side_files import on_this_machine

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_CONTEXT_TOKENS = 2_048
# a configuration is untrusted, and its values reach arithmetic and shapes deep inside transformers
_WHAT_A_WRONG_CONFIGURATION_RAISES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_scorable(like: Path) -> None:
    """Raises InputError where a checkpoint's configuration or tokenizer cannot be used, without its
    tensors.
    """
    with _explained(like):
        _architecture(like)


def load_scorer(tensors: Mapping[str, Tensor], like: Path, *, context_tokens: int | None = None) -> Scorer:
    """A transformers model with these `tensors`, configuration and tokenizer from checkpoint `like`.

    Code that a checkpoint brings along is never run. Raises InputError where tensors and configuration do not
    fit.
    """
    import torch

    with _explained(like):
        config, tokenizer, architecture = _architecture(like)
        model, info = architecture.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    wrong = sorted([*info["missing_keys"], *info["unexpected_keys"], *mismatched])
    if wrong:
        raise InputError(
            f"{like}: its configuration does not fit its tensors, for example {printable(wrong[0])}"
        )
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    longest = getattr(config, "max_position_embeddings", None) or _LONGEST_CONTEXT_TOKENS
    return Scorer(
        model=model,
        tokenizer=tokenizer,
        context_tokens=context_tokens or min(int(longest), _LONGEST_CONTEXT_TOKENS),
    )


def _architecture(like: Path) -> tuple[Any, Any, Any]:
    """A checkpoint's configuration, tokenizer, and the class of its model."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtra("evaluation", "eval", "transformers") from error
    import torch

    from pma.evaluation.quiet import quiet_transformers

    quiet_transformers()
    with on_this_machine(like) as folder:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return config, tokenizer, type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


@contextmanager
def _explained(like: Path) -> Iterator[None]:
    """What transformers raises of a wrong configuration, as InputError."""
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError as error:
        raise MissingExtra("evaluation", "eval", "transformers") from error
    try:
        yield
    except (StrictDataclassError, *_WHAT_A_WRONG_CONFIGURATION_RAISES) as error:
        raise InputError(
            f"{like} cannot be evaluated: its configuration or tokenizer is missing, damaged or unknown to "
            f"transformers ({printable(str(error))})"
        ) from error
