"""Which part of a model a tensor belongs to, told by its name, in the names that trainers use."""

from __future__ import annotations

import re

EMBEDDING, ATTENTION, MLP, EXPERTS, ROUTER, NORMS, OTHER = (
    "embedding",
    "attention",
    "mlp",
    "experts",
    "router",
    "norms",
    "other",
)
#: in the order they are shown
GROUPS = (EMBEDDING, ATTENTION, MLP, EXPERTS, ROUTER, NORMS, OTHER)

# the first that matches decides: a norm inside attention is a norm, a router inside an MLP is a router
_PATTERNS = (
    (NORMS, r"norm|(^|[._])ln(_|\d|\.|$)"),
    (ROUTER, r"(^|[._])(router|gate|wg)(\.|$)|shared_expert_gate"),
    (EXPERTS, r"expert"),
    (EMBEDDING, r"embed|lm_head|(^|\.)(wte|wpe|tokens|output|output_layer|unembed)(\.|$)"),
    (ATTENTION, r"att|(^|[._])(qkv|[qkvo]_proj|w[qkvo]|query_key_value|rotary)(\.|$)"),
    (MLP, r"mlp|ffn|feed_?forward|(gate|up|down)_proj|(^|[._])(fc\d?|c_fc|w[123])(\.|$)"),
)
_COMPILED = tuple((group, re.compile(pattern)) for group, pattern in _PATTERNS)


def group_of(name: str) -> str:
    """One of `GROUPS`."""
    lower = name.lower()
    return next((group for group, pattern in _COMPILED if pattern.search(lower)), OTHER)
