"""Text to token ids and back, with what a checkpoint's folder says about special tokens.

Reads `tokenizer.json` (the `tokenizers` library), `tokenizer_config.json` and
`special_tokens_map.json`. Owns encoding, the incremental detokenizer and the texts of single tokens.
Chat templates are `backends.llm.template`'s business, sampling defaults those of
`backends.llm.defaults`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

from naiad.core.errors import InvalidModel, InvalidRequest

_MAX_HELD_TOKENS = 16
"""Tokens without text after which a stream takes its bytes for invalid rather than incomplete."""
_NUM_CONTEXT_TOKENS = 6
"""Tokens of the prompt's end that decide how the answer's first token is spelled."""


class Detokenizer(Protocol):
    """Token ids of one answer to text, piece by piece.

    No piece contains a U+FFFD for bytes that a later token may still complete. All pieces and
    `flush` joined are the text of all ids decoded at once.
    """

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""

    def flush(self) -> str:
        """What is left at the end: a U+FFFD for each incomplete character."""


class Tokenizer:
    """The tokenizer of one checkpoint. Encoding releases the GIL and may run in any thread."""

    def __init__(self, rust: RustTokenizer, special_tokens: dict[str, str]) -> None:
        rust.no_truncation()  # tokenizer.json may carry the limits of whoever trained it
        rust.no_padding()
        self._rust = rust
        self.special_tokens = special_tokens
        """Role (`bos_token`) to content (`<s>`), as templates see them."""
        self._texts: dict[int, str] = {}
        self._bytes = _TokenBytes(rust) if isinstance(rust.decoder, ByteLevel) else None

    @staticmethod
    def from_folder(folder: Path) -> Tokenizer:
        """Read a checkpoint's tokenizer.

        Raises:
            InvalidModel: no `tokenizer.json`, or a file that is not what its name says.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidModel(
                f"{folder} has no tokenizer.json",
                hint="save the tokenizer in the fast format: AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(folder)",
            )
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:
            raise InvalidModel(f"{path} cannot be read: {error}") from error
        return Tokenizer(rust, _special_tokens(folder))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-sequence token that `tokenizer_config.json` names."""
        content = self.special_tokens.get("eos_token")
        return None if content is None else self.token_id(content)

    def token_id(self, content: str) -> int | None:
        """The id of a token by its content."""
        found: int | None = self._rust.token_to_id(content)
        return found

    def max_token_chars(self) -> int:
        """Length of the longest token, so that a text's least number of tokens is known."""
        return max(map(len, self._rust.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the post-processor adds.

        Raises:
            InvalidRequest: text that is not Unicode (lone surrogates).
        """
        try:
            ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequest(
                "the prompt is not valid Unicode: it has lone surrogates"
            ) from None
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; unknown ids have none."""
        text: str = self._rust.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token alone, special tokens by their content."""
        text = self._texts.get(token_id)
        if text is None:
            if self._bytes is not None:
                text = self._bytes[token_id].decode("utf-8", "replace")
            else:
                text = _piece_text(self._rust, token_id)
            self._texts[token_id] = text
        return text

    def detokenizer(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A new detokenizer for an answer to this prompt."""
        if self._bytes is not None:
            skipped = self._bytes.special_ids if skip_special_tokens else frozenset[int]()
            return ByteDetokenizer(self._bytes, skipped)
        context = prompt_token_ids[-_NUM_CONTEXT_TOKENS:]
        return StreamDetokenizer(self._rust, context, skip_special_tokens=skip_special_tokens)


class _TokenBytes(dict[int, bytes]):
    """Id to the bytes it stands for, filled as ids are seen; only for byte-level decoders."""

    def __init__(self, rust: RustTokenizer) -> None:
        super().__init__()
        self._rust = rust
        self._byte_of_char = _byte_level_alphabet()
        added = rust.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)

    def __missing__(self, token_id: int) -> bytes:
        token = self._rust.id_to_token(token_id) or ""
        try:
            value = bytes(self._byte_of_char[char] for char in token)
        except KeyError:  # an added token, spelled as it is
            value = token.encode()
        self[token_id] = value
        return value


class ByteDetokenizer:
    """For byte-level vocabularies (GPT-2, Llama 3, Qwen): every token is bytes, whatever precedes."""

    __slots__ = ("_bytes", "_decoder", "_is_whole", "_skipped")

    def __init__(self, token_bytes: _TokenBytes, skipped: frozenset[int]) -> None:
        self._bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_whole = True  # no character is incomplete

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        table, skipped = self._bytes, self._skipped
        data = b"".join([table[t] for t in token_ids if t not in skipped])
        if self._is_whole:
            try:
                return data.decode()  # nearly always, and four times as fast
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(data)
        self._is_whole = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        """A U+FFFD if the last character is incomplete."""
        return self._decoder.decode(b"", True)


class StreamDetokenizer:
    """For every other decoder, whose tokens depend on their neighbours (SentencePiece, WordPiece).

    `DecodeStream` of tokenizers does the work. Where its assumption fails (decoding more tokens
    changed text it had already given), the stream starts anew: text already sent cannot be taken
    back.
    """

    __slots__ = ("_held", "_last", "_rust", "_skip", "_stream")

    def __init__(
        self, rust: RustTokenizer, context: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._rust = rust
        self._skip = skip_special_tokens
        self._last = list(context)  # tokens whose text has been given, enough to decode the next
        self._held: list[int] = []  # tokens whose text has not
        self._stream = DecodeStream(ids=self._last, skip_special_tokens=skip_special_tokens)

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        pieces = []
        for token_id in token_ids:
            self._held.append(token_id)
            try:
                piece = self._stream.step(self._rust, token_id)
            except Exception:  # noqa: BLE001 - tokenizers raises bare Exception: invalid prefix
                piece = self._restart()
            if piece is None:
                if len(self._held) > _MAX_HELD_TOKENS:
                    pieces.append(self._restart())
                continue
            self._last, self._held = self._held, []
            pieces.append(piece)
        return "".join(pieces)

    def flush(self) -> str:
        """What the tokens without text so far decode to."""
        return self._restart() if self._held else ""

    def _restart(self) -> str:
        """The text of the held tokens, as far as it continues what was given; a new stream."""
        before = self._rust.decode(self._last, skip_special_tokens=self._skip)
        after = self._rust.decode(self._last + self._held, skip_special_tokens=self._skip)
        given = before if after.startswith(before) else before.rstrip("\ufffd")
        text = after[len(given) :] if after.startswith(given) else after[len(before) :]
        self._last, self._held = self._held, []
        self._stream = DecodeStream(ids=self._last, skip_special_tokens=self._skip)
        return text


def _piece_text(rust: RustTokenizer, token_id: int) -> str:
    """One token's text where decoders strip the space in front of the first: decode it second."""
    piece = rust.id_to_token(token_id)
    if piece is None:
        return ""
    both = rust.decode([token_id, token_id], skip_special_tokens=False)
    one = rust.decode([token_id], skip_special_tokens=False)
    return str(both[len(one) :]) if both.startswith(one) else str(one)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}


def _special_tokens(folder: Path) -> dict[str, str]:
    """Role to content, from both files that may say; `tokenizer_config.json` wins."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role, token in read_json(folder / name).items():
            if not role.endswith("_token"):
                continue
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                found[role] = content
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        InvalidModel: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value
