"""The engine: scheduler, cache and runner, one step at a time, in this thread.

`Engine` is the driver between two pure parts: it turns the scheduler's plan into arrays, runs them, and
turns what comes back into messages. It starts no thread and opens no socket; `engine.process` wraps it
in a process, `naiad.LLM` calls it directly.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from naiad.core.clock import Clock, SystemClock
from naiad.core.errors import InternalError, NaiadError, WireError
from naiad.engine import admission
from naiad.engine.batch import RowInput, StepBatch, build_batch
from naiad.engine.config import EngineConfig
from naiad.engine.decoder import Progress
from naiad.engine.loading import load
from naiad.engine.messages import (
    EngineRequest,
    EngineStats,
    Rejected,
    SequenceOutput,
    StepOutputs,
    TokenLogprobs,
)
from naiad.engine.rows import Draw, RowTable
from naiad.engine.runner import PromptSpan, StepResult
from naiad.engine.scheduler.base import RowPlan, SequenceUpdate, StepPlan
from naiad.engine.scheduler.planner import Scheduler
from naiad.engine.scheduler.sequence import Sequence

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 2
"""Steps of the model that may fail in a row before the device counts as broken."""


class Engine:
    """A loaded model with its scheduler.

    Args:
        path: Checkpoint folder.
        config: How to run it.
        progress: Told how far loading has come, 0 to 1, and what is being done.
        clock: Stamps arrivals and outputs; the client's times are the host's.

    Raises:
        InvalidModel: the checkpoint cannot be run.
        InvalidSettings: the configuration does not fit it or the machine.
    """

    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        progress: Progress = lambda fraction, text: None,
        *,
        clock: Clock = SystemClock(),  # noqa: B008 - it has no state
    ) -> None:
        loaded = load(path, config, progress)
        self.info = loaded.info
        self._runner, self._kv = loaded.runner, loaded.kv
        self._block_tokens, self._device = loaded.block_tokens, loaded.device
        self._scheduler = Scheduler(loaded.limits, loaded.kv)
        self._rows = RowTable(loaded.limits.max_num_seqs, loaded.vocab_size, loaded.device)
        self._clock = clock
        self._rejected: list[Rejected] = []
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        """By request id, one line per prompt token read so far, until answer 0 reports them."""
        self._failures: list[str] = []
        """Of the last steps of the model, all of which failed."""
        self._num_steps = self._num_prompt_tokens = self._num_generated_tokens = 0

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. One that cannot be taken is `Rejected` by the next step."""
        try:
            admission.check(request, self.info.vocab_size)
            self._scheduler.add(request, self._clock.now_ns())
        except NaiadError as error:
            self._rejected.append(Rejected(request.id, WireError.of(error)))
            return
        if request.sampling.prompt_logprobs is not None:
            self._prompt_logprobs[request.id] = [None]

    def cancel(self, request_id: int, index: int = -1) -> None:
        """Forget a request (or one answer of it); nothing more is reported for it."""
        for sequence in self._scheduler.cancel(request_id, index):
            self._take_prompt_logprobs(sequence)

    def has_work(self) -> bool:
        """Whether a step would do or report something."""
        return bool(self._rejected) or self._is_broken() or self._scheduler.has_work()

    def step(self) -> StepOutputs:
        """Run one step of the model and report it.

        A step that fails fails every request it could have touched with an internal error; the
        engine goes on with an empty queue.

        Raises:
            InternalError: `MAX_FAILED_STEPS` have failed in a row and been reported; only a new
                process can help.
        """
        if self._is_broken():
            text = f"{len(self._failures)} steps in a row failed, the last with"
            raise InternalError(f"{text} {self._failures[-1]}")
        plan = self._scheduler.plan(self._clock.now_ns())
        outputs: list[SequenceOutput] = []
        num_tokens = 0
        if plan is not None:
            num_tokens = plan.num_tokens
            try:
                outputs = self._run(plan)
                self._failures.clear()
            except Exception as error:  # noqa: BLE001 -- whatever it is, its requests get an answer
                self._fail(error)
        rejected, self._rejected = self._rejected, []
        return StepOutputs(outputs=outputs, rejected=rejected, stats=self.stats(num_tokens))

    def stats(self, num_step_tokens: int = 0) -> EngineStats:
        """Counters and gauges now."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_usage=self._kv.used_tokens / self._kv.capacity_tokens,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries_tokens=scheduler.num_prefix_query_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_step_tokens=num_step_tokens,
        )

    def check(self) -> None:
        """Raise `AssertionError` if the cache's bookkeeping is broken; for tests and idle time."""
        self._kv.check()

    def close(self) -> None:
        """Drop everything queued; the tensors go with the object."""
        self._scheduler.fail_all()
        self._prompt_logprobs.clear()

    def _run(self, plan: StepPlan) -> list[SequenceOutput]:
        for sequence in plan.admitted:
            self._rows.set(sequence.row, sequence.request.sampling, sequence.index)
        rows = sorted(plan.rows, key=self._layout_order)
        batch = self._batch(rows)
        drawing = [row for row in rows if row.samples]
        draws = [
            Draw(row.sequence.row, row.sequence.token_ids, row.sequence.num_prompt)
            for row in drawing
        ]
        spans, wanted = _prompt_spans(rows, batch)
        released = self._kv.take_released()
        result = self._runner.run(batch, self._rows.batch(draws), plan.copies, spans, released)
        for row, lines in zip(wanted, result.prompts, strict=True):
            self._keep_prompt_logprobs(row, lines)
        by_row = {id(row): number for number, row in enumerate(drawing)}
        order = [by_row[id(row)] for row in plan.rows if row.samples]
        tokens = [result.token_ids[number] for number in order]
        updates = self._scheduler.commit(plan, tokens, self._clock.now_ns())
        self._num_steps += 1
        return self._report(updates, drawing, result)

    def _layout_order(self, row: RowPlan) -> tuple[bool, int]:
        """Rows of one token first, by block: batched attention wants neighbours in the cache."""
        return row.num_tokens != 1, self._kv.block_table(row.sequence.key)[0]

    def _batch(self, rows: Seq[RowPlan]) -> StepBatch:
        inputs = [
            RowInput(
                row.sequence.token_ids[row.start : row.start + row.num_tokens],
                row.start,
                self._kv.block_table(row.sequence.key),
                row.samples,
            )
            for row in rows
        ]
        return build_batch(inputs, self._block_tokens, self._device)

    def _keep_prompt_logprobs(self, row: RowPlan, lines: list[TokenLogprobs]) -> None:
        """Collect over chunks; a recomputed prompt (after preemption) overwrites what was there."""
        self._prompt_logprobs[row.sequence.request.id][row.start + 1 :] = lines

    def _report(
        self, updates: Seq[SequenceUpdate], drawing: Seq[RowPlan], result: StepResult
    ) -> list[SequenceOutput]:
        lines = {}
        if result.logprobs is not None:
            keys = (row.sequence.key for row in drawing)
            lines = dict(zip(keys, result.logprobs, strict=True))
        outputs = []
        for update in updates:
            if not update.token_ids and update.finish_reason is None:
                continue
            outputs.append(self._output(update, lines.get(update.sequence.key)))
        return outputs

    def _output(self, update: SequenceUpdate, line: TokenLogprobs | None) -> SequenceOutput:
        sequence, request = update.sequence, update.sequence.request
        first = sequence.num_generated == len(update.token_ids)
        self._num_generated_tokens += len(update.token_ids)
        if first:
            self._num_prompt_tokens += sequence.num_prompt if sequence.index == 0 else 0
        wants = request.sampling.logprobs
        finished = update.finish_reason is not None
        return SequenceOutput(
            id=request.id,
            index=sequence.index,
            token_ids=update.token_ids,
            logprobs=[_cut(line, wants)] if line is not None and wants is not None else None,
            finish_reason=update.finish_reason,
            stop_token_id=update.stop_token_id,
            prompt_cached_tokens=sequence.num_cached,
            prompt_logprobs=self._take_prompt_logprobs(sequence) if first else None,
            first_scheduled_ns=sequence.first_scheduled_ns if first or finished else 0,
            first_token_ns=sequence.first_token_ns if first or finished else 0,
        )

    def _take_prompt_logprobs(self, sequence: Sequence) -> list[TokenLogprobs | None] | None:
        """What the prompt was found to be, once, and only for the answer that read it."""
        if sequence.index > 0:
            return None
        return self._prompt_logprobs.pop(sequence.request.id, None)

    def _is_broken(self) -> bool:
        return len(self._failures) >= MAX_FAILED_STEPS

    def _fail(self, error: Exception) -> None:
        """Answer everybody after a failed step and start again with an empty cache."""
        log.exception("a step failed")
        cause = f"{type(error).__name__}: {error}"
        self._failures.append(cause)
        ids = {sequence.request.id for sequence in self._scheduler.fail_all()}
        wire = WireError.of(InternalError(f"the engine failed in a step: {cause}"))
        self._rejected += [Rejected(request_id, wire) for request_id in sorted(ids)]
        self._prompt_logprobs.clear()
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()


def _prompt_spans(rows: Seq[RowPlan], batch: StepBatch) -> tuple[list[PromptSpan], list[RowPlan]]:
    """Where prompt log probabilities are wanted in this step, and the rows they belong to."""
    spans: list[PromptSpan] = []
    wanted: list[RowPlan] = []
    for row, span in zip(rows, batch.rows, strict=True):
        sequence = row.sequence
        num_top = sequence.request.sampling.prompt_logprobs
        # Once there is an answer the prompt has been reported; it is computed again if preempted.
        is_known = sequence.index > 0 or sequence.num_generated > 0
        if num_top is None or is_known or row.start >= sequence.num_prompt - 1:
            continue
        following = sequence.token_ids[row.start + 1 : row.start + row.num_tokens + 1]
        following = following[: sequence.num_prompt - 1 - row.start]
        spans.append(PromptSpan(span.first, following, num_top))
        wanted.append(row)
    return spans, wanted


def _cut(line: TokenLogprobs, num_top: int) -> TokenLogprobs:
    """A row's own number of most likely tokens, out of the most that any row asked for."""
    if len(line.top_ids) == num_top:
        return line
    return TokenLogprobs(
        line.token_id, line.logprob, line.rank, line.top_ids[:num_top], line.top_logprobs[:num_top]
    )
