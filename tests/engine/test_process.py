"""The engine process's loop, in a thread, and its ties to its parent, for real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from naiad.core.errors import InvalidModel, WireError
from naiad.engine.config import EngineConfig
from naiad.engine.messages import (
    Cancel,
    Configure,
    Died,
    EngineRequest,
    EngineSampling,
    FromEngine,
    Loading,
    Ready,
    SequenceOutput,
    StepOutputs,
    ToEngine,
)
from naiad.engine.process import EngineFactory, serve
from naiad.engine.transport import MAX_FRAME_BYTES, BlockingChannel, PeerGone
from tests.backends.llm import fake_engine
from tests.backends.llm.fake_engine import FakeEngine
from tests.engine import broken_engine

RAISING = 99


class Client:
    """The other end of the socket, blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel: BlockingChannel[FromEngine] = BlockingChannel(sock, FromEngine)
        self._read: list[FromEngine] = []

    def send(self, message: Configure | EngineRequest | Cancel) -> None:
        self.channel.send(message)

    def next(self) -> FromEngine:
        while not self._read:
            self._read = self.channel.receive(wait=True)
        return self._read.pop(0)

    def outputs_of(self, request_id: int) -> list[SequenceOutput]:
        """Everything of a request up to the end of its only answer."""
        found: list[SequenceOutput] = []
        while not found or found[-1].finish_reason is None:
            message = self.next()
            assert isinstance(message, StepOutputs)
            found += [output for output in message.outputs if output.id == request_id]
        return found


@contextmanager
def served(
    make_engine: EngineFactory, path: Path = Path("model"), max_frame_bytes: int = MAX_FRAME_BYTES
) -> Iterator[Client]:
    ours, theirs = socket.socketpair()

    def run() -> None:
        channel: BlockingChannel[ToEngine] = BlockingChannel(
            theirs, ToEngine, max_frame_bytes=max_frame_bytes
        )
        try:
            serve(channel, make_engine)
        except PeerGone:
            pass
        finally:
            theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    client = Client(ours)
    client.send(Configure(path=str(path), config=EngineConfig()))
    try:
        yield client
    finally:
        ours.close()
        thread.join()


def request(number: int, prompt: list[int], max_tokens: int) -> EngineRequest:
    sampling = EngineSampling(max_tokens=max_tokens, seed=0)
    return EngineRequest(id=number, prompt_token_ids=prompt, sampling=sampling, arrival_ns=0)


def test_reports_loading_then_ready_then_one_message_per_step() -> None:
    with served(FakeEngine) as client:
        assert client.next() == Loading(0.5, "half")
        assert isinstance(client.next(), Ready)

        client.send(request(1, [5, 6], max_tokens=3))

        assert [output.token_ids for output in client.outputs_of(1)] == [[5], [6], [5]]


def test_a_checkpoint_that_cannot_be_loaded_is_explained() -> None:
    def refuse(*_: object) -> FakeEngine:
        raise InvalidModel("no config.json", hint="add one")

    with served(refuse) as client:
        died = client.next()

    assert died == Died(WireError("invalid", "no config.json", "add one"))


def test_anything_else_that_loading_raises_reaches_the_client(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> FakeEngine:
        raise MemoryError("no room")

    with served(fail) as client:
        died = client.next()

    assert died == Died(WireError("internal", "MemoryError: no room"))
    assert "MemoryError" in capsys.readouterr().err


class Fragile(FakeEngine):
    """Raises in a step whose requests include the token RAISING, or always once broken."""

    broken = False

    def step(self) -> StepOutputs:
        if self.broken or any(RAISING in s.request.prompt_token_ids for s in self.waiting):
            self.waiting.extend(self.running)
            raise ZeroDivisionError("a bad step")
        return super().step()


def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with served(Fragile) as client:
        client.next(), client.next()
        client.send(request(1, [RAISING], max_tokens=3))
        step = client.next()
        assert isinstance(step, StepOutputs)
        assert [rejected.id for rejected in step.rejected] == [1]
        assert step.rejected[0].error.kind == "internal"
        assert "a bad step" in step.rejected[0].error.message

        client.send(request(2, [5], max_tokens=1))
        assert client.outputs_of(2)[-1].finish_reason == "length"
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_engine_whose_every_step_raises_dies(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Fragile):
        broken = True

        def cancel(self, request_id: int, index: int = -1) -> None:
            pass  # so broken that it cannot even forget

    with served(Broken) as client:
        client.next(), client.next()
        client.send(request(1, [5], max_tokens=3))
        assert isinstance(client.next(), StepOutputs)
        assert isinstance(client.next(), Died)
        with pytest.raises(PeerGone):
            client.next()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_an_engine_on_a_broken_device_dies_after_answering(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The real engine: it answers for its failed steps itself, and still must not go on forever."""
    with served(broken_engine.make) as client:
        while not isinstance(client.next(), Ready):
            pass
        for number in (1, 2):
            client.send(request(number, [5], max_tokens=3))
            step = client.next()
            assert isinstance(step, StepOutputs)
            assert [rejected.id for rejected in step.rejected] == [number]
            if number == 1:  # a step without work between them is no sign of health
                client.send(Cancel(number))
        message = client.next()
        while isinstance(message, StepOutputs):
            message = client.next()
        assert isinstance(message, Died)
        assert "the device is gone" in message.error.message
    capsys.readouterr()


class Talkative(FakeEngine):
    """Says as many tokens at once as the first token of the prompt tells it."""

    def step(self) -> StepOutputs:
        outputs = super().step()
        for output in outputs.outputs:
            output.token_ids[1:] = [1000] * output.token_ids[0]
        return outputs


def test_a_report_too_large_for_one_message_comes_in_several() -> None:
    with served(Talkative, max_frame_bytes=1500) as client:
        client.next(), client.next()
        sampling = EngineSampling(max_tokens=1, seed=0, n=8)
        client.send(EngineRequest(id=1, prompt_token_ids=[300], sampling=sampling, arrival_ns=0))

        found: list[SequenceOutput] = []
        while len(found) < 8:
            message = client.next()
            assert isinstance(message, StepOutputs)
            assert not message.rejected
            found += message.outputs
        assert [(output.index, len(output.token_ids)) for output in found] == [
            (index, 301) for index in range(8)
        ]


def test_an_answer_too_large_for_any_message_fails_its_own_request() -> None:
    with served(Talkative, max_frame_bytes=1500) as client:
        client.next(), client.next()
        client.send(request(1, [2000], max_tokens=5))
        step = client.next()
        assert isinstance(step, StepOutputs)
        assert [rejected.id for rejected in step.rejected] == [1]
        assert step.rejected[0].error.kind == "too_large"
        assert "bytes" in step.rejected[0].error.message

        client.send(request(2, [5], max_tokens=1))
        (said,) = client.outputs_of(2)
        assert len(said.token_ids) == 6, "the engine goes on"


def test_a_cancelled_request_is_out_of_the_next_report() -> None:
    with served(FakeEngine) as client:
        client.next(), client.next()
        client.send(request(1, [5], max_tokens=10**9))
        running = client.next()
        assert isinstance(running, StepOutputs)
        assert running.stats.num_running == 1

        client.send(Cancel(1))
        last = running
        while last.stats.num_running:
            message = client.next()
            assert isinstance(message, StepOutputs)
            last = message
        assert last.stats.num_running == 0


def test_an_engine_without_work_waits_without_using_the_processor() -> None:
    stepped = threading.Event()

    class Idle(FakeEngine):
        num_steps = 0

        def step(self) -> StepOutputs:
            Idle.num_steps += 1
            stepped.set()
            return super().step()

    with served(Idle) as client:
        client.next(), client.next()
        client.send(Cancel(1))
        assert isinstance(client.next(), StepOutputs)
        client.send(Cancel(2))
        assert isinstance(client.next(), StepOutputs)
        # Between the two there were no steps of its own accord.
        assert Idle.num_steps == 2


def start_child(folder: Path) -> tuple[subprocess.Popen[bytes], Client, socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(
            [*fake_engine.COMMAND, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
        )
    client = Client(ours)
    client.send(Configure(path=str(folder), config=EngineConfig()))
    while not isinstance(client.next(), Ready):
        pass
    return child, client, ours


def test_the_process_ignores_signals_of_the_group_and_ends_with_its_socket(tmp_path: Path) -> None:
    child, client, ours = start_child(tmp_path)
    with ours:
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGTERM)
        client.send(request(1, [5], max_tokens=2))
        assert client.outputs_of(1)[-1].finish_reason == "length"
    assert child.wait(10) == 0


def test_an_idle_process_uses_no_processor_time(tmp_path: Path) -> None:
    child, client, ours = start_child(tmp_path)
    with ours:
        client.send(request(1, [5], max_tokens=2))
        client.outputs_of(1)
        process = psutil.Process(child.pid)
        before = process.cpu_times()
        until(lambda: process.status() == psutil.STATUS_SLEEPING, "asleep")
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)  # the span that is measured
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.02
    child.wait(10)


def test_the_process_dies_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "fake_engine.json").write_text('{"hang_token": 7}')
    source = f"""
import os, sys
from pathlib import Path
from tests.engine.test_process import request, start_child
child, client, ours = start_child(Path({str(tmp_path)!r}))
client.send(request(1, [7], max_tokens=2))  # it will never look at the socket again
print(child.pid, flush=True)
sys.stdin.read()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))

        parent.kill()

    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "dead")


def until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    """Wait for something outside of Python that signals nobody."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not {what} after {timeout_s} s"
        os.sched_yield()
