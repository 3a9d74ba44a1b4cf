"""A scorer's model as lm-evaluation-harness wants it, with batches of equal work instead of equal count."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from pma.errors import InputError, MissingExtra, printable
from pma.evaluation.scoring import TOKENS_A_BATCH, Scorer

# ((context, continuation) as text, context tokens, continuation tokens)
_Request = tuple[tuple[str, str], list[int], list[int]]
_Answer = tuple[float, bool]
_SHORTEST_TOKENS = 32


def harness_model(scorer: Scorer) -> Any:
    """The harness's `HFLM` around `scorer`'s model and tokenizer; nothing is loaded from anywhere."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingExtra("evaluation by tasks", "eval", printable(error.name or "lm-eval")) from error
    model: Any = HFLM(
        pretrained=scorer.model,
        tokenizer=scorer.tokenizer,
        backend="causal",
        max_length=scorer.context_tokens,
        batch_size=max(1, TOKENS_A_BATCH // scorer.context_tokens),
        prefix_token_id=scorer.start_token,
        softmax_dtype="float32",  # else a bf16 model's log-likelihoods are rounded to three digits
        trust_remote_code=False,
    )
    harness_scores = model._loglikelihood_tokens

    def by_length(requests: Sequence[_Request], **how: Any) -> list[_Answer]:
        return _scored_by_length(model, harness_scores, requests, **how)

    model._loglikelihood_tokens = by_length
    return model


def _scored_by_length(
    model: Any, harness_scores: Callable[..., list[_Answer]], requests: Sequence[_Request], **how: Any
) -> list[_Answer]:
    """Answers in the order of `requests`; asked for by length, so that short texts go in large batches."""
    groups = defaultdict(list)
    for place, request in enumerate(requests):
        _check_fits(request, model.max_length)
        tokens = min(len(request[1]) + len(request[2]), model.max_length)
        groups[max(_SHORTEST_TOKENS, 1 << (tokens - 1).bit_length())].append(place)
    answers: list[_Answer] = [(math.nan, False)] * len(requests)
    usual = model.batch_size_per_gpu
    for tokens, places in groups.items():
        model.batch_size_per_gpu = max(1, TOKENS_A_BATCH // tokens)
        # override_bs is only for the harness's own search of a batch size
        scored = harness_scores([requests[place] for place in places], **how)
        for place, (nats, greedy) in zip(places, scored, strict=True):
            if not math.isfinite(nats):
                raise InputError(
                    f"the model gives the log-likelihood {nats} to "
                    f"{printable(repr(requests[place][0][1]), 60)}"
                )
            answers[place] = nats, greedy
    model.batch_size_per_gpu = usual
    return answers


def _check_fits(request: _Request, context_tokens: int) -> None:
    (_, continuation), given, wanted = request
    if not given or not wanted or len(wanted) > context_tokens:
        raise InputError(
            f"an answer of a task has {len(wanted)} tokens, expected 1 to {context_tokens}, as the model "
            f"looks at no more: {printable(repr(continuation), 60)}; leave that task out"
        )
