"""Options of other servers that Naiad knows and does not do, refused with a reason.

Silence would be worse: an answer that ignored a grammar or an adapter looks like one that obeyed.
A value that asks for nothing (false, null, one beam) passes. The tables belong to the protocols
that name the options; this module compares and raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from naiad.core.errors import Unsupported


class Refusal(msgspec.Struct, frozen=True):
    """Why an option is not done, and the values that ask for nothing."""

    reason: str
    neutral: tuple[Any, ...] = ()
    """Beside null, the empty string and the empty list or object, which always ask for nothing."""


_EMPTY: tuple[Any, ...] = (None, "", [], {}, [""])

NO_LORA = Refusal("adapters are not served")
NO_GRAMMAR = Refusal("constrained decoding is not available")
NO_IMAGES = Refusal("the model takes text only")
NO_BEAMS = Refusal("answers are sampled, not beam-searched; ask for n answers", (0, 1, False))

REFUSED_SAMPLING: Mapping[str, Refusal] = {
    "use_beam_search": NO_BEAMS,
    "beam_width": NO_BEAMS,
    "bad_words": Refusal("words cannot be banned; use logit_bias for single tokens"),
    "allowed_token_ids": Refusal("the vocabulary cannot be restricted; use logit_bias"),
    "structured_outputs": NO_GRAMMAR,
    "guided_decoding": NO_GRAMMAR,
    "guided_json": NO_GRAMMAR,
    "guided_regex": NO_GRAMMAR,
    "guided_choice": NO_GRAMMAR,
    "guided_grammar": NO_GRAMMAR,
    "lora_name": NO_LORA,
    "logits_processors": Refusal("requests cannot carry code"),
    "truncate_prompt_tokens": Refusal("prompts are never cut silently; send a shorter one"),
    "detokenize": Refusal("answers are always text", (True,)),
    "spaces_between_special_tokens": Refusal("it is always on", (True,)),
    "output_kind": Refusal("use stream"),
    "extra_args": Refusal("there are none"),
}
"""Sampling options by vLLM's names, whichever protocol they come through."""


def refuse(values: Mapping[str, Any], table: Mapping[str, Refusal]) -> None:
    """Raise `Unsupported` for the first option in `table` that `values` really asks for."""
    for name, value in values.items():
        if value is None:  # nearly all, of every request
            continue
        refusal = table.get(name)
        if refusal is not None and not _is_neutral(value, refusal):
            raise Unsupported(f"`{name}` is not supported: {refusal.reason}", param=name)


def _is_neutral(value: Any, refusal: Refusal) -> bool:
    # To Python, True is 1; to a client, one beam is not "use beams".
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in (*_EMPTY, *refusal.neutral)
    )
