"""The real engine on a tiny checkpoint: killed, orphaned, and in-process against its own process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch")

from naiad.backends.llm.client import State
from naiad.backends.llm.model import EngineLanguageModel, load_language_model
from naiad.backends.llm.offline import LLM
from naiad.core.errors import InternalError, Unavailable
from naiad.core.generation import GenerateRequest, SamplingParams, TextPrompt
from naiad.engine.config import EngineConfig
from tests.engine import broken_engine
from tools.make_tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

CONFIG = EngineConfig(num_threads=1)
PROMPTS = ["Once upon a time", "The quick brown fox", "0 1 2 3", "Où est la bibliothèque ?"]
LONG = SamplingParams(max_tokens=480, ignore_eos=True)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("real") / "tiny")


async def text(model: EngineLanguageModel, prompt: str, sampling: SamplingParams) -> str:
    request = GenerateRequest(id="r", prompt=TextPrompt(prompt), sampling=sampling)
    return "".join([delta.text async for delta in model.generate(request)])


async def test_killed_under_load_it_fails_requests_in_a_second_and_serves_again_in_five(
    checkpoint: Path,
) -> None:
    model = await load_language_model(checkpoint, CONFIG)
    first_load_s = model.client.load_s
    streams = [
        model.generate(GenerateRequest(id="r", prompt=TextPrompt(prompt), sampling=LONG))
        for prompt in PROMPTS * 4
    ]
    await asyncio.gather(*map(anext, streams))
    pid = model.client.pid
    assert pid is not None

    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
    errors_s = time.monotonic() - began
    assert await text(model, PROMPTS[0], SamplingParams(max_tokens=4, ignore_eos=True))
    served_s = time.monotonic() - began
    await model.close()

    assert errors_s < 1.0
    assert served_s < max(5.0, 2 * first_load_s)  # the second where the machine is busy


async def test_an_engine_on_a_broken_device_is_started_again(checkpoint: Path) -> None:
    model = await load_language_model(checkpoint, CONFIG, command=broken_engine.COMMAND)
    few = SamplingParams(max_tokens=4, ignore_eos=True)
    for _ in range(2):
        with pytest.raises(InternalError, match="the device is gone"):
            await text(model, PROMPTS[0], few)

    (checkpoint / "mended").touch()
    while model.client.state is State.READY:  # noqa: ASYNC110 - the state has no event
        await asyncio.sleep(0)
    said = await text(model, PROMPTS[0], few)
    num_restarts = model.client.num_restarts
    await model.close()
    (checkpoint / "mended").unlink()

    assert said
    assert num_restarts == 1


def test_a_killed_server_leaves_no_engine_behind(checkpoint: Path) -> None:
    source = f"""
import asyncio
from naiad.backends.llm.model import load_language_model
from naiad.core.generation import GenerateRequest, SamplingParams, TextPrompt
from naiad.engine.config import EngineConfig

async def main():
    model = await load_language_model({str(checkpoint)!r}, EngineConfig(num_threads=1))
    request = GenerateRequest(
        id="r", prompt=TextPrompt("a"), sampling=SamplingParams(max_tokens=500, ignore_eos=True)
    )
    while True:
        async for _ in model.generate(request):
            print(model.client.pid, flush=True)

asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, env=environment
    ) as server:
        assert server.stdout is not None
        engine = psutil.Process(int(server.stdout.readline()))
        server.kill()

    deadline_s = time.monotonic() + 5
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, "the engine outlived its server by 5 s"
        os.sched_yield()


async def test_the_process_and_the_offline_engine_say_the_same(checkpoint: Path) -> None:
    greedy = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
    drawn = SamplingParams(max_tokens=30, ignore_eos=True, seed=7)
    with LLM(checkpoint, num_threads=1) as llm:
        offline = [
            [result.outputs[0].text for result in llm.generate(PROMPTS, params, use_tqdm=False)]
            for params in (greedy, drawn)
        ]

    model = await load_language_model(checkpoint, CONFIG)
    served = [
        await asyncio.gather(*(text(model, prompt, params) for prompt in PROMPTS))
        for params in (greedy, drawn)
    ]
    await model.close()

    assert served == offline
    assert offline[0] != offline[1]
