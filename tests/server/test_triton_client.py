"""Triton's own HTTP client, in the part of it that speaks JSON."""

from __future__ import annotations

import numpy as np
import tritonclient.http.aio as triton

from naiad.backends.identity import IdentityModel
from naiad.backends.scripted import ScriptedLanguageModel
from tests.server.conftest import SCRIPT, Start


async def test_tritons_client_sees_a_server_it_knows(start: Start) -> None:
    async with (
        start(IdentityModel(), ScriptedLanguageModel(SCRIPT, name="org/story")) as running,
        triton.InferenceServerClient(running.url.removeprefix("http://")) as client,
    ):
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("org/story")
        metadata = await client.get_model_metadata("identity")
        assert (await client.get_server_metadata())["name"] == "naiad"
        assert (await client.get_model_config("identity"))["max_batch_size"] == 0
        given = triton.InferInput("INPUT0", [2, 2], "FP32")
        array = np.array([[1, 2], [3, 4]], np.float32)
        given.set_data_from_numpy(array, binary_data=False)
        result = await client.infer("identity", [given])
        statistics = await client.get_inference_statistics("identity")

    assert metadata["inputs"] == [{"name": "INPUT0", "datatype": "FP32", "shape": [-1, -1]}]
    assert metadata["versions"] == ["1"]
    assert np.array_equal(result.as_numpy("OUTPUT0"), array)
    assert statistics["model_stats"][0]["inference_stats"]["success"]["count"] == 1
