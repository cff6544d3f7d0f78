"""What a checkpoint says about how it wants to be sampled and where its answers end.

Reads `generation_config.json`, and `config.json` where that is silent. Fields that Naiad does not
take from a checkpoint (its length limits, beam search) are ignored, as vLLM ignores them.

An id outside the vocabulary is refused: no answer would ever end there. A sampling value that no
request could have is ignored with a warning: requests set their own, and the neutral one serves.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from naiad.backends.llm.tokenizer import Tokenizer, read_json
from naiad.core.errors import InvalidModel
from naiad.core.generation import SamplingParams

logger = logging.getLogger(__name__)


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
            InvalidModel: a value of the wrong type, or an id outside the vocabulary; the message
                names file and value.
        """
        path = folder / "generation_config.json"
        found = read_json(path)
        config = read_json(folder / "config.json")
        values: dict[str, Any] = {
            name: found[name]
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            if found.get(name) is not None
        }
        ids_path, ids = path, found.get("eos_token_id")
        if ids is None:
            ids_path, ids = folder / "config.json", _of_text_model(config, "eos_token_id")
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        try:
            defaults = msgspec.convert({**values, "eos_token_ids": listed}, ModelDefaults)
        except msgspec.ValidationError as error:
            raise InvalidModel(f"{path}: {error}") from None
        ids = defaults.eos_token_ids
        vocab_size = _of_text_model(config, "vocab_size")
        if type(vocab_size) is not int:
            vocab_size = tokenizer.vocab_size
        _check_ids(ids_path, ids, vocab_size)
        own = tokenizer.eos_token_id
        if own is not None and own not in ids:
            _check_ids(folder / "tokenizer.json", (own,), vocab_size)
            ids = (*ids, own)
        neutral = {
            name: getattr(_NEUTRAL, name)
            for name, value in values.items()
            if _is_out_of_range(path, name, value)
        }
        return msgspec.structs.replace(defaults, eos_token_ids=ids, **neutral)


_NEUTRAL = ModelDefaults()


def _of_text_model(config: dict[str, Any], name: str) -> Any:
    """A value of the model config, or of its part about text."""
    return config.get(name, (config.get("text_config") or {}).get(name))


def _check_ids(path: Path, ids: tuple[int, ...], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidModel(
                f"{path}: eos_token_id {token_id} is outside the vocabulary of {vocab_size}"
            )


def _is_out_of_range(path: Path, name: str, value: Any) -> bool:
    """Whether no request could have `value`; says so."""
    try:
        msgspec.convert({name: value}, SamplingParams)
    except msgspec.ValidationError as error:
        reason = str(error).partition(" - at `")[0]
        logger.warning("%s: %s %s is ignored: %s", path, name, value, reason)
        return True
    return False
