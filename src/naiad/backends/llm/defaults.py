"""What a checkpoint says about how it wants to be sampled and where its answers end.

Reads `generation_config.json`, and `config.json` where that is silent. Fields that Naiad does not
take from a checkpoint (its length limits, beam search) are ignored, as vLLM ignores them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from naiad.backends.llm.tokenizer import Tokenizer, read_json
from naiad.core.errors import InvalidModel


class ModelDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling values for requests that leave them open, and the ids that end a sequence."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @staticmethod
    def from_folder(folder: Path, tokenizer: Tokenizer) -> ModelDefaults:
        """Read a checkpoint's defaults; neutral values where it has none.

        Raises:
            InvalidModel: a value of the wrong type; the message names file and field.
        """
        path = folder / "generation_config.json"
        found = read_json(path)
        values: dict[str, Any] = {
            name: found[name]
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if found.get(name) is not None
        }
        values["eos_token_ids"] = _eos_token_ids(folder, found, tokenizer)
        try:
            return msgspec.convert(values, ModelDefaults)
        except msgspec.ValidationError as error:
            raise InvalidModel(f"{path}: {error}") from None


def _eos_token_ids(folder: Path, generation: dict[str, Any], tokenizer: Tokenizer) -> list[Any]:
    """Generation config's ids, else the model config's; and the tokenizer's own."""
    ids = generation.get("eos_token_id")
    if ids is None:
        config = read_json(folder / "config.json")
        ids = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    own = tokenizer.eos_token_id
    return listed if own is None or own in listed else [*listed, own]
