"""Golden cases: the engine against transformers on tiny random checkpoints, as measured numbers.

Every case runs on a `Setup` (device, dtype, op bodies, KV layout) and returns numbers; whoever calls
decides what is good enough (`tests/engine/test_golden.py`, `tests/gpu/golden_h200.py`). The reference
is transformers in fp32 on the CPU, from the same files. Logits are compared through the decoder, at
every position; tokens through the engine. Needs no pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from naiad.engine.batch import RowInput, build_batch
from naiad.engine.checkpoint import Checkpoint, read_config
from naiad.engine.decoder import Decoder
from naiad.engine.families import family_of
from naiad.engine.kv.base import KvCopy
from naiad.engine.kv.storage import KvStorage, SlotStorage
from naiad.engine.messages import EngineRequest, EngineSampling
from naiad.engine.ops.base import Target
from naiad.engine.ops.table import OpTable
from naiad.engine.rows import Draw, RowTable
from naiad.engine.sampling import sample
from tests.engine.driving import (
    MAX_LEN,
    PAGE_TOKENS,
    Setup,
    checkpoint,
    drive,
    greedy,
    make_engine,
    request,
    tokens_of,
)

Numbers = dict[str, float]

NUM_PAGES = 64
LENGTHS = (37, 64, 5, 90)
"""Of the sequences whose logits are compared."""


@cache
def reference_model(path: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """transformers' model; it never stops by itself."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


@cache
@torch.inference_mode()
def reference_logits(
    path: Path, token_ids: tuple[int, ...], dtype: str = "float32", device: str = "cpu"
) -> torch.Tensor:
    """`[tokens, vocab]` fp32, on the CPU."""
    ids = torch.tensor([token_ids], device=device)
    logits: torch.Tensor = reference_model(path, dtype, device)(ids).logits[0]
    return logits.float().cpu()


@cache
def reference_tokens(path: Path, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What transformers' greedy `generate` appends to `prompt`."""
    ids = torch.tensor([prompt])
    found = reference_model(path).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer


# ---------------------------------------------------------------- logits, through the decoder


class DecoderRun:
    """One decoder with a cache whose unused places hold large finite values, fed by hand."""

    def __init__(self, path: Path, setup: Setup) -> None:
        raw = read_config(path)
        family = family_of(raw)
        spec = family.spec(raw)
        device, dtype = torch.device(setup.device), getattr(torch, setup.dtype)
        self._slots = setup.layout == "slots"
        self._device, self._block_tokens = device, MAX_LEN if self._slots else PAGE_TOKENS
        table = OpTable(setup.ops, Target(device, dtype, self._block_tokens, MAX_LEN))
        self._decoder = Decoder(spec, family, Checkpoint(path), table)
        self._storage: KvStorage = (
            SlotStorage(spec, 8, dtype=dtype, device=device)
            if self._slots
            else KvStorage(spec, NUM_PAGES, PAGE_TOKENS, dtype=dtype, device=device)
        )
        for layer in self._storage.layers:
            layer.fill_(1000.0)
        self._free_pages = torch.randperm(
            NUM_PAGES, generator=torch.Generator().manual_seed(0)
        ).tolist()
        self._free_slots = [6, 2, 5, 0, 1, 3]
        self._tables: list[list[int]] = []

    def start(self, length: int, parent: int = -1, num_shared: int = 0) -> list[KvCopy]:
        """Give the next sequence room, the first places those of `parent`; returns copy orders."""
        if self._slots:
            slot = self._free_slots.pop()
            self._tables.append([slot])
            source = self._tables[parent][0]
            return [KvCopy(source, slot, num_shared)] if num_shared else []
        num_full, num_tail = divmod(num_shared, PAGE_TOKENS)
        table = self._tables[parent][:num_full] if num_shared else []
        table = [
            *table,
            *(self._free_pages.pop() for _ in range(-(-length // PAGE_TOKENS) - num_full)),
        ]
        self._tables.append(table)
        if not num_tail:
            return []
        return [KvCopy(self._tables[parent][num_full], table[num_full], num_tail)]

    @torch.inference_mode()
    def step(
        self, rows: Sequence[tuple[int, int, Sequence[int]]], copies: Sequence[KvCopy] = ()
    ) -> list[torch.Tensor]:
        """Run rows of (sequence, start, tokens), in any order; fp32 logits of every token of each."""
        order = sorted(
            range(len(rows)),
            key=lambda number: (len(rows[number][2]) != 1, self._tables[rows[number][0]][0]),
        )
        inputs = []
        for number in order:
            sequence, start, tokens = rows[number]
            inputs.append(RowInput(tokens, start, self._tables[sequence], samples=True))
        batch = build_batch(inputs, self._block_tokens, self._device)
        self._storage.begin(batch, copies)
        x = self._decoder.hidden(batch, self._storage, every_token=True)
        logits = self._decoder.logits(x).float().cpu()
        found = [torch.empty(0)] * len(rows)
        for number, span in zip(order, batch.rows, strict=True):
            found[number] = logits[span.first : span.first + span.num_tokens]
        return found


Chunks = list[list[tuple[int, int]]]
"""Steps of (sequence, number of tokens)."""


def _single_shot() -> Chunks:
    return [[(number, length)] for number, length in enumerate(LENGTHS)]


def _chunked() -> Chunks:
    """Chunks across page borders, of one token too, and an uneven rest."""
    steps: Chunks = []
    for number, length in enumerate(LENGTHS):
        left = length
        for size in (7, 1, 16, 13, 32, 64):
            size = min(size, left)
            steps += [[(number, size)]] if size else []
            left -= size
    return steps


def _decode() -> Chunks:
    """Short prompts at once, then one token each and step, ragged: whoever is done leaves."""
    steps: Chunks = [[(number, 3) for number in range(len(LENGTHS))]]
    for position in range(3, max(LENGTHS)):
        steps.append([(n, 1) for n, length in enumerate(LENGTHS) if position < length])
    return steps


def _mixed() -> Chunks:
    """Sequence after sequence starts while the earlier ones decode."""
    done = [0] * len(LENGTHS)
    steps: Chunks = []
    while done != list(LENGTHS):
        rows = []
        for number, length in enumerate(LENGTHS):
            if len(steps) < 4 * number or done[number] == length:
                continue
            wanted = 1 if done[number] >= length // 2 else 9 + number
            wanted = min(wanted, length - done[number])
            done[number] += wanted
            rows.append((number, wanted))
        steps.append(rows)
    return steps


SCHEDULES: dict[str, Callable[[], Chunks]] = {
    "prefill": _single_shot,
    "chunked prefill": _chunked,
    "decode": _decode,
    "mixed": _mixed,
}


def logits_case(schedule: str, shape: str, setup: Setup) -> Numbers:
    """Compare the logits of every position of every sequence under one of `SCHEDULES`."""
    path = checkpoint(shape, setup.dtype)
    run = DecoderRun(path, setup)
    sequences = [tokens_of(number, length) for number, length in enumerate(LENGTHS)]
    for tokens in sequences:
        run.start(len(tokens))
    done = [0] * len(sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in SCHEDULES[schedule]():
        rows = []
        for number, count in step:
            rows.append((number, done[number], sequences[number][done[number] :][:count]))
            done[number] += count
        for (number, _), logits in zip(step, run.step(rows), strict=True):
            parts[number].append(logits)
    assert done == list(LENGTHS), "the schedule covers every token"
    found = [torch.cat(part) for part in parts]
    return compare_logits(setup, path, sequences, found)


def shared_prefix_case(shape: str, setup: Setup) -> Numbers:
    """Compare logits behind shared full pages and a copied tail (slots: a copied prefix).

    The parent goes on writing behind the shared part; a grandchild is copied from a child in the
    same step as the child is copied from the parent, which needs the orders to run in sequence.
    """
    path = checkpoint(shape, setup.dtype)
    run = DecoderRun(path, setup)
    parent = tokens_of(1, 60)
    num_shared = PAGE_TOKENS * 2 + 9
    child = parent[:num_shared] + tokens_of(2, 30)
    grandchild = parent[:num_shared] + tokens_of(3, 11)
    run.start(len(parent) + 5)
    run.step([(0, 0, parent[:50])])
    copies = run.start(len(child), 0, num_shared)
    copies += run.start(len(grandchild), 1, num_shared)
    rows = [(n, num_shared, ids[num_shared:]) for n, ids in ((1, child), (2, grandchild))]
    found = run.step([(0, 50, parent[50:]), *rows], copies)
    return compare_logits(setup, path, (parent, child, grandchild), found)


def compare_logits(
    setup: Setup, path: Path, sequences: Sequence[Sequence[int]], found: Sequence[torch.Tensor]
) -> Numbers:
    """`difference` of the last positions of sequences, as many as were found, from the reference.

    In a dtype of less than fp32 also how far transformers is away, in that dtype on that device:
    how much of an error is the type's.
    """

    def last(dtype: str, device: str) -> torch.Tensor:
        parts = []
        for tokens, logits in zip(sequences, found, strict=True):
            parts.append(reference_logits(path, tuple(tokens), dtype, device)[-len(logits) :])
        return torch.cat(parts)

    wanted = last("float32", "cpu")
    numbers = difference(torch.cat(list(found)), wanted)
    if setup.dtype != "float32":
        theirs = difference(last(setup.dtype, setup.device), wanted)
        numbers["transformers_relative_error"] = theirs["relative_error"]
        numbers["transformers_top1_agreement"] = theirs["top1_agreement"]
    return numbers


def difference(found: torch.Tensor, wanted: torch.Tensor) -> Numbers:
    """How far `[positions, vocab]` logits are apart."""
    gap = found.double() - wanted.double()
    return {
        "num_positions": len(wanted),
        "max_abs_error": float(gap.abs().max()),
        "relative_error": float(gap.norm() / wanted.double().norm()),
        "top1_agreement": float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "max_abs_logit": float(wanted.abs().max()),
    }


# ---------------------------------------------------------------- tokens, through the engine


def _compare_tokens(
    shape: str, setup: Setup, requests: Sequence[tuple[int, EngineRequest]], **options: Any
) -> Numbers:
    """Drive an engine through `requests`; count tokens that greedy `generate` would not have said."""
    engine = make_engine(shape, setup, **options)
    answers = drive(engine, requests)
    path = checkpoint(shape, setup.dtype)
    num_tokens = num_wrong = 0
    for _, one in requests:
        wanted = reference_tokens(path, tuple(one.prompt_token_ids), one.sampling.max_tokens)
        for index in range(one.sampling.n):
            found = answers.tokens[one.id, index]
            num_tokens += len(wanted)
            num_wrong += len(wanted) - sum(a == b for a, b in zip(found, wanted, strict=False))
            num_wrong += max(len(found) - len(wanted), 0)
    stats = answers.stats
    return {
        "num_tokens": num_tokens,
        "num_wrong_tokens": num_wrong,
        "num_mixed_steps": answers.num_mixed_steps,
        "num_preemptions": stats.num_preemptions,
        "num_prefix_hit_tokens": stats.num_prefix_hit_tokens,
        "kv_usage_at_end": stats.kv_usage,
    }


def _requests(lengths: Sequence[int], num_tokens: int) -> list[tuple[int, EngineRequest]]:
    return [
        (0, request(number, tokens_of(number, length), greedy(max_tokens=num_tokens)))
        for number, length in enumerate(lengths)
    ]


def tokens_single(shape: str, setup: Setup) -> Numbers:
    """One request, prompt read in one step."""
    return _compare_tokens(shape, setup, _requests([40], 24))


def tokens_batch(shape: str, setup: Setup) -> Numbers:
    """Several requests of other lengths at once."""
    return _compare_tokens(shape, setup, _requests(LENGTHS, 20))


def tokens_chunked(shape: str, setup: Setup) -> Numbers:
    """Prompts read in chunks of at most 11 tokens a step, decode rows first."""
    return _compare_tokens(shape, setup, _requests(LENGTHS, 12), max_num_batched_tokens=11)


def tokens_mixed(shape: str, setup: Setup) -> Numbers:
    """Requests that arrive while others decode, all reading in chunks."""
    wave = [(3 * n, one) for n, (_, one) in enumerate(_requests((30, 50, 1, 70, 20), 16))]
    return _compare_tokens(shape, setup, wave, max_num_batched_tokens=16)


def tokens_preempted(shape: str, setup: Setup) -> Numbers:
    """A cache too small for all: some give way and are computed again."""
    small = {"kv_cache_tokens": 96, "max_num_batched_tokens": 24}
    return _compare_tokens(shape, setup, _requests((20, 21, 15, 18, 3, 9), 24), **small)


def tokens_preempted_without_prefix_cache(shape: str, setup: Setup) -> Numbers:
    """As `tokens_preempted`; nothing of the first computation is reused."""
    small = {"kv_cache_tokens": 96, "prefix_cache": False}
    return _compare_tokens(shape, setup, _requests((20, 21, 15, 18, 3, 9), 24), **small)


def tokens_prefix(shape: str, setup: Setup) -> Numbers:
    """Prefixes of a running and of an ended request: full pages, copied tails, the whole prompt."""
    first = tokens_of(9, 50)
    prompts = [
        (0, first),
        (5, first[:40] + tokens_of(10, 12)),  # the first one still runs
        (6, first[:47]),
        (60, first),  # it has ended
        (61, first[:43] + tokens_of(11, 30)),
    ]
    requests = [
        (step, request(number, prompt, greedy(max_tokens=14)))
        for number, (step, prompt) in enumerate(prompts)
    ]
    return _compare_tokens(shape, setup, requests)


def tokens_forked(shape: str, setup: Setup) -> Numbers:
    """Several answers to one prompt, which is computed once."""
    requests = [
        (0, request(0, tokens_of(4, 41), greedy(max_tokens=12, n=3))),
        (2, request(1, tokens_of(5, 33), greedy(max_tokens=12, n=2))),
    ]
    return _compare_tokens(shape, setup, requests, max_num_batched_tokens=20)


def tokens_seeded(shape: str, setup: Setup) -> Numbers:
    """Answers drawn with a seed in company, against the same ones drawn alone."""
    ways: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.3, "top_p": 0.8, "presence_penalty": 0.5},
        {"temperature": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ]
    requests = []
    for number, way in enumerate(ways):
        sampling = greedy(max_tokens=16, seed=2**64 - 2 + number, n=1 + number % 2, **way)
        requests.append((2 * number, request(number, tokens_of(number, 30), sampling)))
    small = {"kv_cache_tokens": 160, "max_num_batched_tokens": 20}
    company = drive(make_engine(shape, setup, **small), requests)
    alone: dict[tuple[int, int], list[int]] = {}
    for _, one in requests:
        alone |= drive(make_engine(shape, setup), [(0, one)]).tokens
    pairs = [pair for key in alone for pair in zip(company.tokens[key], alone[key], strict=True)]
    return {
        "num_tokens": len(pairs),
        "num_wrong_tokens": sum(ours != theirs for ours, theirs in pairs),
        "num_preemptions": company.stats.num_preemptions,
        "kv_usage_at_end": company.stats.kv_usage,
    }


TOKEN_CASES: dict[str, Callable[[str, Setup], Numbers]] = {
    "single": tokens_single,
    "batch": tokens_batch,
    "chunked prefill": tokens_chunked,
    "mixed": tokens_mixed,
    "preempted": tokens_preempted,
    "preempted without prefix cache": tokens_preempted_without_prefix_cache,
    "prefix hits": tokens_prefix,
    "forked": tokens_forked,
    "seeded": tokens_seeded,
}

MUST_HAPPEN: dict[str, str] = {
    "mixed": "num_mixed_steps",
    "preempted": "num_preemptions",
    "preempted without prefix cache": "num_preemptions",
    "seeded": "num_preemptions",
    "prefix hits": "num_prefix_hit_tokens",
}
"""The number of a token case that must not be zero, or it tests nothing."""


# ---------------------------------------------------------------- sampling, alone


def sampling_case(device: str) -> Numbers:
    """Draw from the same random logits on `device` and on the CPU, every parameter in use."""
    num_rows, vocab = 96, 4096
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_rows, vocab, generator=generator)
    history = torch.randint(vocab, (num_rows, 40), generator=generator).tolist()
    samplings = [
        EngineSampling(
            max_tokens=1,
            temperature=(0.0, 0.5, 1.0, 2.0)[row % 4],
            top_k=(0, 1, 20, 700)[row // 2 % 4],
            top_p=(1.0, 0.3, 0.95, 0.9999)[row // 3 % 4],
            min_p=(0.0, 0.1)[row // 4 % 2],
            presence_penalty=(0.0, 1.0)[row // 5 % 2],
            frequency_penalty=(0.0, -0.5)[row // 6 % 2],
            repetition_penalty=(1.0, 1.3)[row // 7 % 2],
            logit_bias={row: 5.0} if row % 9 == 0 else {},
            seed=row,
            stop_token_ids=(int(logits[row].argmax()),),
            min_tokens=100 if row % 8 == 0 else 0,
        )
        for row in range(num_rows)
    ]

    def drawn(where: str, position: int) -> torch.Tensor:
        rows = RowTable(num_rows, vocab, torch.device(where))
        for row, sampling in enumerate(samplings):
            rows.set(row, sampling, 0)
        draws = [Draw(row, history[row][:position], 10) for row in range(num_rows)]
        return sample(logits.to(where), rows.batch(draws)).cpu()

    num_differing = num_forbidden = 0
    for position in range(11, 40):
        ours, theirs = drawn(device, position), drawn("cpu", position)
        num_differing += int((ours != theirs).sum())
        for row in range(0, num_rows, 8):
            num_forbidden += int(ours[row]) in samplings[row].stop_token_ids
    return {
        "num_draws": 29 * num_rows,
        "num_differing": num_differing,
        "num_forbidden": num_forbidden,
    }
