"""An engine process that dies, hangs, refuses or comes back, and the requests it was working on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from naiad.backends.llm.client import EngineClient, State, Supervision
from naiad.core.errors import InvalidModel, NaiadError, QueueFull, Unavailable
from naiad.engine.config import EngineConfig
from naiad.engine.messages import EngineRequest, EngineSampling, SequenceOutput
from tests.backends.llm.conftest import MakeClient

pytestmark = pytest.mark.anyio

FATAL, HANGING = 98, 97
ENDLESS = 10**9


class Reader:
    """A sink that keeps everything and wakes whoever waits for it."""

    def __init__(self) -> None:
        self.outputs: list[SequenceOutput] = []
        self.error: NaiadError | None = None
        self._changed = asyncio.Event()

    def feed(self, output: SequenceOutput, now_ns: int) -> None:
        self.outputs.append(output)
        self._changed.set()

    def fail(self, error: NaiadError) -> None:
        self.error = error
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def first(self) -> None:
        await self.until(lambda: bool(self.outputs))

    async def failure(self) -> NaiadError:
        await self.until(lambda: self.error is not None)
        assert self.error is not None
        return self.error


async def send(client: EngineClient, prompt: list[int], max_tokens: int = 3, **more: Any) -> Reader:
    reader = Reader()
    await client.open(
        EngineRequest(
            id=client.new_id(),
            prompt_token_ids=prompt,
            sampling=EngineSampling(max_tokens=max_tokens, seed=0, **more),
            arrival_ns=time.monotonic_ns(),
        ),
        reader,
    )
    return reader


async def test_every_request_gets_its_own_outputs(make_client: MakeClient) -> None:
    client = await make_client()

    readers = [await send(client, [number]) for number in range(5)]

    for number, reader in enumerate(readers):
        await reader.until(lambda r=reader: r.outputs and r.outputs[-1].finish_reason)  # type: ignore[misc]
        assert [output.token_ids for output in reader.outputs] == [[number]] * 3


async def test_progress_of_loading_is_reported(make_client: MakeClient) -> None:
    seen: list[tuple[float, str]] = []
    await make_client(progress=lambda fraction, text: seen.append((fraction, text)))
    assert seen == [(0.5, "half")]


async def test_a_checkpoint_that_cannot_be_loaded_is_an_invalid_model(
    make_client: MakeClient,
) -> None:
    with pytest.raises(InvalidModel, match="bad shape") as caught:
        await make_client(load_error="bad shape")
    assert caught.value.hint == "use another"


async def test_a_process_that_dies_while_loading_is_unavailable(make_client: MakeClient) -> None:
    with pytest.raises(Unavailable, match="died while loading"):
        await make_client(exit_while_loading=True)


async def test_kill_fails_requests_at_once_and_the_next_one_is_served(
    make_client: MakeClient,
) -> None:
    client = await make_client(step_s=0.001)
    readers = [await send(client, [5], ENDLESS) for _ in range(20)]
    for reader in readers:
        await reader.first()
    killed_pid = client.pid
    assert killed_pid is not None

    began = time.monotonic()
    os.kill(killed_pid, signal.SIGKILL)
    errors = [await reader.failure() for reader in readers]
    errors_s = time.monotonic() - began
    state = client.state
    after = await send(client, [5])  # waits for the restart
    await after.first()
    served_s = time.monotonic() - began

    assert all(isinstance(error, Unavailable) for error in errors)
    assert errors[0].facts["retry_after_s"] >= 1
    assert errors_s < 1.0
    assert state is State.RESTARTING
    assert served_s < 5.0
    assert client.num_restarts == 1
    assert not psutil.pid_exists(killed_pid)  # reaped


async def test_a_request_that_kills_the_engine_is_not_sent_again(make_client: MakeClient) -> None:
    client = await make_client(exit_token=FATAL)

    fatal = await send(client, [FATAL])
    assert isinstance(await fatal.failure(), Unavailable)

    good = await send(client, [5])
    await good.first()
    assert client.num_restarts == 1


async def test_a_process_that_keeps_dying_is_given_up(make_client: MakeClient) -> None:
    client = await make_client(
        supervision=Supervision(max_quick_deaths=2, first_backoff_s=0.01), exit_token=FATAL
    )
    assert client.is_ready()
    (client.folder / "fake_engine.json").write_text('{"exit_while_loading": true}')

    fatal = await send(client, [FATAL])
    await fatal.failure()
    with pytest.raises(Unavailable, match="the engine is failed"):
        await send(client, [5])

    assert client.state is State.FAILED
    assert not client.is_ready()


async def test_it_comes_back_once_what_killed_it_is_mended(make_client: MakeClient) -> None:
    client = await make_client(
        supervision=Supervision(first_backoff_s=0.01, max_quick_deaths=1000), exit_token=FATAL
    )
    (client.folder / "fake_engine.json").write_text('{"exit_unless": "mended"}')
    fatal = await send(client, [FATAL])
    await fatal.failure()

    waiting = asyncio.create_task(send(client, [5]))
    (client.folder / "mended").touch()

    await (await waiting).first()


async def test_a_start_that_the_system_refuses_is_a_failed_start(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await make_client(
        supervision=Supervision(first_backoff_s=0.01, max_quick_deaths=1000), exit_token=FATAL
    )
    refusals = [BlockingIOError(11, "no process left"), OSError(24, "too many open files")]

    def refuse_twice(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        if refusals:
            raise refusals.pop()
        return real(*arguments, **options)

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", refuse_twice)
    await (await send(client, [FATAL])).failure()

    await (await send(client, [5])).first()

    assert refusals == []
    assert client.num_restarts == 1


async def test_a_first_start_that_the_system_refuses_says_why(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise BlockingIOError(11, "no process left")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(Unavailable, match=r"cannot be started: .*no process left"):
        await make_client()


async def test_waiting_for_a_restart_has_a_bound(make_client: MakeClient) -> None:
    client = await make_client(
        supervision=Supervision(restart_wait_s=0.05, first_backoff_s=30), exit_token=FATAL
    )
    (client.folder / "fake_engine.json").write_text('{"exit_while_loading": true}')
    await (await send(client, [FATAL])).failure()

    with pytest.raises(Unavailable, match=r"not back after 0\.05 s") as caught:
        await send(client, [5])
    assert caught.value.facts["retry_after_s"] >= 1


async def test_silence_with_work_is_not_ready_and_without_work_it_is(
    make_client: MakeClient,
) -> None:
    client = await make_client(
        supervision=Supervision(stall_timeout_s=120, exit_grace_s=0.1), hang_token=HANGING
    )
    hour_later = time.monotonic_ns() + 3600 * 10**9
    assert client.is_ready(hour_later)

    await send(client, [HANGING])

    assert client.is_ready()
    assert not client.is_ready(hour_later)


async def test_an_engine_that_is_silent_for_too_long_is_sent_nothing_more(
    make_client: MakeClient,
) -> None:
    client = await make_client(
        supervision=Supervision(stall_timeout_s=0, exit_grace_s=0.1), hang_token=HANGING
    )
    await send(client, [HANGING])

    with pytest.raises(Unavailable, match="no step for 0 s"):
        await send(client, [5])


async def test_a_stalled_engine_is_killed_its_requests_fail_and_another_serves(
    make_client: MakeClient,
) -> None:
    client = await make_client(
        supervision=Supervision(stall_timeout_s=0.3, exit_grace_s=0.1), hang_token=HANGING
    )
    pid = client.pid
    assert pid is not None
    hanging = [await send(client, [HANGING]) for _ in range(2)]

    for reader in hanging:
        error = await reader.failure()
        assert isinstance(error, Unavailable)
        assert "no step for 0.3 s" in str(error)
        assert error.facts["retry_after_s"] >= 1
    await (await send(client, [5])).first()

    assert client.num_restarts == 1
    assert not psutil.pid_exists(pid)


async def test_an_engine_that_reports_steps_is_never_taken_for_stalled(
    make_client: MakeClient,
) -> None:
    client = await make_client(supervision=Supervision(stall_timeout_s=0.3), step_s=0.05)
    reader = await send(client, [5], max_tokens=16)

    await reader.until(lambda: len(reader.outputs) == 16)

    assert client.num_restarts == 0
    assert reader.error is None


async def test_a_hung_engine_is_killed_when_the_client_closes(make_client: MakeClient) -> None:
    client = await make_client(supervision=Supervision(exit_grace_s=0.1), hang_token=HANGING)
    reader = await send(client, [HANGING])
    pid = client.pid
    assert pid is not None

    await client.close()

    assert isinstance(reader.error, Unavailable)
    assert not psutil.pid_exists(pid)
    with pytest.raises(Unavailable, match="the engine is closed"):
        await send(client, [5])


async def test_closing_during_a_restart_leaves_no_process(make_client: MakeClient) -> None:
    client = await make_client(exit_token=FATAL)
    await (await send(client, [FATAL])).failure()

    await client.close()

    assert client.pid is None
    assert psutil.Process().children() == []


async def test_more_requests_than_engine_and_queue_hold_are_refused(
    make_client: MakeClient,
) -> None:
    client = await make_client(
        config=EngineConfig(max_queued_requests=2), max_num_seqs=1, hang_token=HANGING
    )
    for _ in range(3):
        await send(client, [HANGING])

    with pytest.raises(QueueFull, match="3 requests are in flight, the model takes 3"):
        await send(client, [5])


async def test_the_engines_own_refusal_reaches_the_request(make_client: MakeClient) -> None:
    client = await make_client(
        config=EngineConfig(max_queued_requests=1), max_num_seqs=2, step_s=0.01
    )
    readers = [await send(client, [5], ENDLESS) for _ in range(3)]
    refused = [reader for reader in readers if reader.error is not None]
    while not refused:
        await readers[0].until(lambda: any(reader.error for reader in readers))
        refused = [reader for reader in readers if reader.error is not None]
    assert all(isinstance(reader.error, QueueFull) for reader in refused)


async def test_a_reader_that_raises_does_not_disturb_the_others(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client()

    class Raising(Reader):
        def feed(self, output: SequenceOutput, now_ns: int) -> None:
            raise KeyError("bug")

    raising = Raising()
    request = EngineRequest(
        id=client.new_id(),
        prompt_token_ids=[5],
        sampling=EngineSampling(max_tokens=ENDLESS, seed=0),
        arrival_ns=0,
    )
    await client.open(request, raising)
    other = await send(client, [6])

    assert "KeyError" in str(await raising.failure())
    await other.until(lambda: len(other.outputs) == 3)
