"""The tensors behind the cache: copy orders, and slots that grow and shrink with what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from naiad.engine.batch import RowInput, StepBatch, build_batch
from naiad.engine.kv.base import KvCopy
from naiad.engine.kv.storage import KvStorage, SlotStorage
from naiad.engine.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec

CPU = torch.device("cpu")
SPEC = ModelSpec(
    architecture="any",
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    max_positions=4096,
    norm=NormSpec("rms", 1e-6),
    attention=AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=4, scale=0.5),
    mlp=MlpSpec(8, "silu", gated=True),
)
NUM_SLOTS = 4


def slot_storage() -> SlotStorage:
    return SlotStorage(SPEC, NUM_SLOTS, dtype=torch.float32, device=CPU)


def step(*rows: tuple[int, int, int]) -> StepBatch:
    """Rows of (slot, start, new tokens)."""
    return build_batch(
        [RowInput([0] * new, start, [slot], samples=True) for slot, start, new in rows], 4096, CPU
    )


def write(storage: KvStorage, block: int, start: int, values: list[float]) -> None:
    """Put one number per place, the layer's number added, where a step would."""
    for number, layer in enumerate(storage.layers):
        places = torch.tensor(values) + 1000 * number
        layer[:, block, :, start : start + len(values)] = places[None, None, :, None]


def held(storage: KvStorage, block: int, length: int) -> list[float]:
    """What a block's first places hold, which is the same in every layer, head and dimension."""
    rows = []
    for number, layer in enumerate(storage.layers):
        part = layer[:, block, :, :length] - 1000 * number
        assert bool((part == part[:1, :1, :, :1]).all())
        rows.append(part[0, 0, :, 0].tolist())
    assert rows[0] == rows[1]
    return rows[0]


def test_pages_start_finite_and_have_the_shape_of_the_model() -> None:
    storage = KvStorage(SPEC, 3, 16, dtype=torch.bfloat16, device=CPU)

    assert [layer.shape for layer in storage.layers] == [torch.Size([2, 3, 2, 16, 4])] * 2
    assert all(bool((layer == 0).all()) for layer in storage.layers)
    assert storage.layers[0].dtype == torch.bfloat16
    assert storage.block_places == 16


def test_copy_orders_run_one_after_the_other() -> None:
    storage = KvStorage(SPEC, 4, 8, dtype=torch.float32, device=CPU)
    write(storage, 0, 0, [1, 2, 3, 4, 5, 6, 7, 8])
    write(storage, 3, 0, [9] * 8)

    storage.begin(step((3, 0, 1)), [KvCopy(0, 1, 5), KvCopy(1, 2, 3), KvCopy(3, 0, 2)])

    assert held(storage, 1, 5) == [1, 2, 3, 4, 5]
    assert held(storage, 2, 3) == [1, 2, 3], "from the copy, not from before it"
    assert not storage.layers[1][:, 1, :, 5:].any(), "no more than was ordered"
    assert held(storage, 0, 8) == [9, 9, 3, 4, 5, 6, 7, 8], "its old values had been read"


def test_slots_grow_by_whole_steps_and_tell_the_batch() -> None:
    storage = slot_storage()
    batch = step((0, 0, 65))

    storage.begin(batch, [])

    assert storage.block_places == batch.block_places == 128
    later = step((1, 0, 3))
    storage.begin(later, [])
    assert later.block_places == 128


def test_growing_keeps_what_live_and_retained_slots_hold() -> None:
    storage = slot_storage()
    storage.begin(step((0, 0, 60), (2, 0, 10)), [])
    write(storage, 0, 0, [float(n) for n in range(60)])
    write(storage, 2, 0, [float(100 + n) for n in range(10)])

    storage.begin(step((0, 60, 30)), [])

    assert held(storage, 0, 60) == list(range(60))
    assert held(storage, 2, 10) == list(range(100, 110))


def test_a_copy_into_slots_that_must_grow_first_is_whole() -> None:
    storage = slot_storage()
    storage.begin(step((0, 0, 60)), [])
    write(storage, 0, 0, [float(n) for n in range(60)])

    storage.begin(step((3, 60, 500)), [KvCopy(0, 3, 60)])

    assert held(storage, 3, 60) == held(storage, 0, 60) == list(range(60))


def test_a_copy_that_no_row_of_the_step_extends_survives_growth() -> None:
    storage = slot_storage()
    storage.begin(step((0, 0, 60)), [])
    write(storage, 0, 0, [float(n) for n in range(60)])

    storage.begin(step((0, 60, 1)), [KvCopy(0, 2, 50)])
    storage.begin(step((0, 61, 100)), [])

    assert held(storage, 2, 50) == list(range(50))


def test_slots_shrink_when_nothing_long_is_left_and_keep_the_rest() -> None:
    storage = slot_storage()
    storage.begin(step((0, 0, 2000), (1, 0, 40)), [])
    write(storage, 1, 0, [float(n) for n in range(40)])
    assert storage.block_places >= 2000

    batch = step((0, 0, 5))  # slot 0 was given away
    storage.begin(batch, [])

    assert storage.block_places == batch.block_places == 64
    assert held(storage, 1, 40) == list(range(40))


def test_a_released_slot_does_not_keep_the_others_long() -> None:
    storage = slot_storage()
    storage.begin(step((0, 0, 2000), (1, 0, 40)), [])

    batch = step((1, 40, 1))
    storage.begin(batch, [], released=[0])

    assert batch.block_places == 64


@given(data=st.data())
@settings(max_examples=60)
def test_no_history_of_steps_loses_a_value(data: st.DataObject) -> None:
    """Slots written, extended, copied and given away at random, against plain lists."""
    storage = slot_storage()
    known: list[list[float]] = [[] for _ in range(NUM_SLOTS)]
    stamp = 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        slots = data.draw(
            st.lists(st.integers(0, NUM_SLOTS - 1), min_size=1, max_size=3, unique=True)
        )
        copies = []
        source = data.draw(st.integers(0, NUM_SLOTS - 1))
        if source not in slots and known[source] and data.draw(st.booleans()):
            count = data.draw(st.integers(1, len(known[source])))
            copies = [KvCopy(source, slots[0], count)]
            known[slots[0]] = known[source][:count]
        rows = []
        for slot in slots:
            keep = data.draw(st.sampled_from([0, len(known[slot])]))
            known[slot] = known[slot] if copies and slot == slots[0] else known[slot][:keep]
            rows.append((slot, len(known[slot]), data.draw(st.sampled_from([1, 7, 70, 300, 900]))))
        batch = step(*sorted(rows, key=lambda row: row[2] != 1))
        storage.begin(batch, copies)
        assert batch.block_places == storage.block_places
        for slot, start, new in rows:
            stamp += 1
            assert start + new <= storage.block_places
            write(storage, slot, start, [stamp] * new)
            known[slot] += [stamp] * new
        for slot, values in enumerate(known):
            assert held(storage, slot, len(values)) == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_places_cost_no_memory(dtype: torch.dtype) -> None:
    """64 GiB of places on a machine with less: only what is written is there."""
    places = (64 << 30) // (2 * 2 * 2 * 4 * dtype.itemsize) // 64
    storage = KvStorage(SPEC, 64, places, dtype=dtype, device=CPU)

    storage.layers[1][:, 63, :, -1] = 5

    assert float(storage.layers[1][0, 63, 0, -1, 0]) == 5
    assert float(storage.layers[0][0, 0, 0, 0, 0]) == 0
