"""The decoder: what is asked for is what is computed, and a body changes no answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from naiad.engine.batch import RowInput, build_batch
from naiad.engine.checkpoint import Checkpoint
from naiad.engine.decoder import Decoder
from naiad.engine.families import family_of
from naiad.engine.kv.storage import SlotStorage
from naiad.engine.ops.base import Target
from naiad.engine.ops.table import OpTable
from tests.engine.driving import MAX_LEN, SHAPES, checkpoint, tokens_of

CPU = torch.device("cpu")


def make(path: Path, ops: str, dtype: torch.dtype = torch.float32) -> tuple[Decoder, SlotStorage]:
    config = json.loads((path / "config.json").read_text())
    family = family_of(config)
    spec = family.spec(config)
    table = OpTable(ops, Target(CPU, dtype, MAX_LEN, MAX_LEN))
    decoder = Decoder(spec, family, Checkpoint(path), table)
    return decoder, SlotStorage(spec, 4, dtype=dtype, device=CPU)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ops", ["reference", "cpu"])
def test_only_the_sampled_tokens_are_finished_and_they_are_the_same(ops: str, shape: str) -> None:
    decoder, storage = make(checkpoint(shape), ops)
    rows = [
        RowInput(tokens_of(0, 1), 0, [1], samples=True),
        RowInput(tokens_of(1, 30), 0, [0], samples=False),
        RowInput(tokens_of(2, 12), 0, [3], samples=True),
        RowInput(tokens_of(3, 9), 0, [2], samples=True),
    ]
    found = []
    for every_token in (False, True):
        batch = build_batch(rows, MAX_LEN, CPU)
        storage.begin(batch, [])
        found.append(decoder.hidden(batch, storage, every_token=every_token))

    assert found[0].shape[0] == 3
    assert found[1].shape[0] == 52
    torch.testing.assert_close(found[0], found[1][[0, 42, 51]], atol=1e-5, rtol=1e-5)


def test_a_step_that_samples_nothing_still_writes_its_keys_and_values() -> None:
    decoder, storage = make(checkpoint("llama-gqa"), "cpu")
    batch = build_batch([RowInput(tokens_of(1, 30), 0, [2], samples=False)], MAX_LEN, CPU)
    storage.begin(batch, [])

    x = decoder.hidden(batch, storage)

    assert x.shape == (0, 64)
    for layer in storage.layers:
        assert bool((layer[:, 2, :, :30] != 0).any(-1).all())


def test_the_logits_of_one_row_are_those_of_the_row_among_others() -> None:
    decoder, _ = make(checkpoint("gpt2"), "cpu")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    together = decoder.logits(x)

    assert together.shape == (5, 512)
    for row in range(5):
        torch.testing.assert_close(decoder.logits(x[row : row + 1])[0], together[row])


def test_parameters_are_counted_once_also_where_the_head_is_the_embedding() -> None:
    tied, _ = make(checkpoint("llama-mha-tied-biased"), "reference")
    untied, _ = make(checkpoint("llama-gqa"), "reference")

    assert tied.spec.tied_head
    assert not untied.spec.tied_head
    for decoder, shape in ((tied, "llama-mha-tied-biased"), (untied, "llama-gqa")):
        files = Checkpoint(checkpoint(shape))
        slices = [files._files["model.safetensors"].get_slice(name) for name in files._file_of]
        sizes = [torch.Size(part.get_shape()).numel() for part in slices]
        assert decoder.num_parameters == sum(sizes)
