"""Encoding, and text that comes back token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from naiad.backends.llm.tokenizer import ByteDetokenizer, StreamDetokenizer, Tokenizer
from naiad.core.errors import InvalidModel, InvalidRequest
from tests.backends.llm.conftest import byte_level_tokenizer

WORDS = ["▁the", "▁cat", "▁", "c", "at", "▁h", "é", "!", "▁dog", "s"]


def sentencepiece_tokenizer() -> RustTokenizer:
    """In the manner of Llama 2: spaces as ▁, bytes as <0xNN>, the first space stripped."""
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    rust = RustTokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<s>"))
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    rust.add_special_tokens(["<s>", "</s>"])
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return rust


def wordpiece_tokenizer() -> RustTokenizer:
    vocabulary = {token: n for n, token in enumerate(["[UNK]", "the", "cat", "##s", "##at", "!"])}
    rust = RustTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.decoder = decoders.WordPiece(cleanup=True)
    return rust


BYTES = Tokenizer(byte_level_tokenizer(), {})
PIECES = Tokenizer(sentencepiece_tokenizer(), {})
WORDPIECES = Tokenizer(wordpiece_tokenizer(), {})


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.feed([token]) for token in ids), detokenizer.flush()]


@given(ids=st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=40), skip=st.booleans())
def test_byte_level_pieces_join_to_the_full_decode_whatever_the_bytes(
    ids: list[int], skip: bool
) -> None:
    assert "".join(stream(BYTES, ids, skip=skip)) == BYTES.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=30), data=st.data())
def test_text_cut_anywhere_comes_back_without_early_replacement_characters(
    text: str, data: st.DataObject
) -> None:
    tokenizer = data.draw(st.sampled_from([BYTES, PIECES]))
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(258, 257 + len(WORDS)), max_size=30))
def test_sentencepiece_pieces_join_to_the_full_decode(ids: list[int]) -> None:
    assert "".join(stream(PIECES, ids)) == PIECES.decode(ids)


@given(ids=st.lists(st.integers(0, 257 + len(WORDS)), max_size=60))
def test_invalid_bytes_of_a_sentencepiece_model_lose_no_valid_text(ids: list[int]) -> None:
    joined = "".join(stream(PIECES, ids))
    full = PIECES.decode(ids)
    # A run of byte tokens that is invalid as a whole is all U+FFFD in the full decode, although
    # its beginning was valid when it was given out. All that is not bytes must agree.
    words = [PIECES.token_text(token).strip() for token in ids if token >= 258]
    for text in (joined, full):
        rest = text
        for word in words:
            assert word in rest
            rest = rest[rest.index(word) + len(word) :]


@given(ids=st.lists(st.integers(0, 5), max_size=20))
def test_wordpiece_pieces_never_raise_and_keep_every_word(ids: list[int]) -> None:
    joined = "".join(stream(WORDPIECES, ids))
    assert joined.replace(" ", "") == WORDPIECES.decode(ids).replace(" ", "")


def test_endless_invalid_bytes_are_given_out_and_not_held_for_ever() -> None:
    ids = [2 + 0x80] * 1000  # a continuation byte that continues nothing
    detokenizer = PIECES.detokenizer()
    pieces = [detokenizer.feed([token]) for token in ids]
    assert sum(map(len, pieces)) > 900


def test_an_answer_after_a_prompt_keeps_its_leading_space() -> None:
    prompt = PIECES.encode("the")
    ids = [PIECES.token_id("▁cat")]
    assert PIECES.detokenizer(prompt).feed([i for i in ids if i is not None]) == " cat"


def test_byte_level_vocabularies_take_the_exact_way_and_others_the_stream() -> None:
    assert isinstance(BYTES.detokenizer(), ByteDetokenizer)
    assert isinstance(PIECES.detokenizer(), StreamDetokenizer)


def test_special_tokens_are_skipped_only_if_asked() -> None:
    ids = [0, *BYTES.encode("the cat", add_special_tokens=False), 1]
    assert "".join(stream(BYTES, ids)) == "the cat"
    assert "".join(stream(BYTES, ids, skip=False)) == "<s>the cat</s>"


def test_text_gets_the_post_processors_special_tokens_unless_it_has_its_own() -> None:
    assert BYTES.encode("the")[0] == 0
    assert BYTES.encode("the", add_special_tokens=False)[0] != 0


def test_texts_of_single_tokens_keep_their_space_and_mark_partial_bytes() -> None:
    cat = PIECES.token_id("▁cat")
    assert cat is not None
    assert PIECES.token_text(cat) == " cat"
    assert BYTES.token_text(BYTES.encode("é", add_special_tokens=False)[0]) == "\ufffd"
    assert BYTES.token_text(10_000) == ""
    assert PIECES.token_text(10_000) == ""


def test_a_prompt_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Unicode"):
        BYTES.encode("\ud800")


def test_a_folder_without_a_tokenizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"no tokenizer\.json") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_a_broken_tokenizer_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_limits_left_in_the_file_by_its_author_do_not_apply(tmp_path: Path) -> None:
    rust = byte_level_tokenizer()
    rust.enable_truncation(3)
    rust.enable_padding(length=100)
    rust.save(str(tmp_path / "tokenizer.json"))
    assert 4 < len(Tokenizer.from_folder(tmp_path).encode("the cat sat on the mat")) < 100


def test_special_tokens_come_from_both_files_as_text_or_object(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "other"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "add_bos_token": True, "pad_token": None})
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.eos_token_id == 1
