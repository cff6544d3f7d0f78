"""Frames over a socketpair: any cutting, both ends, a slow and a dead peer."""

from __future__ import annotations

import asyncio
import socket
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from naiad.engine.messages import Cancel, EngineStats, FromEngine, StepOutputs, ToEngine
from naiad.engine.transport import (
    BlockingChannel,
    CorruptFrame,
    FrameDecoder,
    FrameEncoder,
    FrameProtocol,
    MessageTooLarge,
    PeerGone,
)


class Blob(msgspec.Struct, tag="blob"):
    data: bytes


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


def frame(message: msgspec.Struct) -> bytes:
    return bytes(FrameEncoder().encode(message))


@given(
    ids=st.lists(st.integers(0, 2**40), max_size=20),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=200),
)
def test_messages_survive_any_cutting_of_the_stream(ids: list[int], cuts: list[int]) -> None:
    stream = b"".join(frame(Cancel(number)) for number in ids)
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)

    seen: list[ToEngine] = []
    number = 0
    while stream:
        size = cuts[number % len(cuts)]
        seen += decoder.feed(stream[:size])
        stream, number = stream[size:], number + 1

    assert seen == [Cancel(number) for number in ids]


def test_a_length_above_the_bound_is_refused_before_its_bytes_arrive() -> None:
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine, max_frame_bytes=100)

    with pytest.raises(CorruptFrame, match=r"101 bytes, the bound is 100"):
        decoder.feed((101).to_bytes(4, "little"))


def test_a_message_above_the_bound_is_not_sent() -> None:
    with pytest.raises(MessageTooLarge, match=r"takes 100"):
        FrameEncoder(max_frame_bytes=100).encode(Blob(bytes(101)))


def test_bytes_that_are_no_message_are_corrupt() -> None:
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)

    with pytest.raises(CorruptFrame, match="no message"):
        decoder.feed((3).to_bytes(4, "little") + b"abc")


def test_the_engine_reads_what_arrived_and_then_finds_the_client_gone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel: BlockingChannel[ToEngine] = BlockingChannel(theirs, ToEngine)
        assert channel.receive(wait=False) == []

        ours.sendall(frame(Cancel(1)) + frame(Cancel(2)))
        assert channel.receive(wait=True) == [Cancel(1), Cancel(2)]

        ours.sendall(frame(Cancel(3)))
        ours.close()
        assert channel.receive(wait=True) == [Cancel(3)]
        with pytest.raises(PeerGone):
            channel.receive(wait=True)
        with pytest.raises(PeerGone):
            channel.send(Cancel(4))


def test_sending_does_not_wait_for_a_slow_client_until_the_bound() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel: BlockingChannel[ToEngine] = BlockingChannel(
            theirs, ToEngine, max_unsent_bytes=4 * 2**20
        )
        for _ in range(3):
            channel.send(Blob(bytes(2**20)))  # nobody reads: this would hang if it waited

        reached: list[bool] = []

        def send_more() -> None:
            for _ in range(4):
                channel.send(Blob(bytes(2**20)))
            channel.flush()
            reached.append(True)

        sender = threading.Thread(target=send_more)
        sender.start()
        received = 0
        total = 7 * len(frame(Blob(bytes(2**20))))
        while received < total:
            received += len(ours.recv(2**20))
        sender.join()
        assert reached == [True]


def test_waiting_for_a_slow_client_ends_when_it_dies() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel: BlockingChannel[ToEngine] = BlockingChannel(theirs, ToEngine, max_unsent_bytes=0)
        closer = threading.Thread(target=ours.close)
        closer.start()

        with pytest.raises(PeerGone):
            channel.send(Blob(bytes(2**24)))
        closer.join()


@pytest.mark.anyio
async def test_the_clients_end_sends_receives_and_reports_the_end() -> None:
    ours, theirs = socket.socketpair()
    received: asyncio.Queue[FromEngine] = asyncio.Queue()
    lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    protocol: FrameProtocol[FromEngine] = FrameProtocol(
        FromEngine, received.put_nowait, lost.set_result
    )
    await asyncio.get_running_loop().create_unix_connection(lambda: protocol, sock=ours)
    channel: BlockingChannel[ToEngine] = BlockingChannel(theirs, ToEngine)

    protocol.send(Cancel(7))
    assert await asyncio.to_thread(lambda: channel.receive(wait=True)) == [Cancel(7)]

    step = StepOutputs(stats=EngineStats(num_steps=1))
    channel.send(step)
    assert await received.get() == step

    channel.close()
    assert await lost is None
    protocol.send(Cancel(8))  # dropped, not raised


@pytest.mark.anyio
async def test_nonsense_from_the_engine_closes_the_connection() -> None:
    ours, theirs = socket.socketpair()
    lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    protocol: FrameProtocol[FromEngine] = FrameProtocol(
        FromEngine, lambda _message: None, lost.set_result
    )
    await asyncio.get_running_loop().create_unix_connection(lambda: protocol, sock=ours)
    with theirs:
        theirs.sendall(b"\xff\xff\xff\xff")

        assert isinstance(await lost, CorruptFrame)
