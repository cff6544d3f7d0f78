"""What every test gets: one thread per process, uvloop, repeatable property tests."""

from __future__ import annotations

import os

# Two test processes share two cores; libraries that read it must not have been imported yet.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "naiad",
    deadline=None,  # a busy machine is no bug
    derandomize=True,  # a failure repeats; HYPOTHESIS_PROFILE=explore looks further
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("naiad"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "naiad"))


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The event loop that the server runs on."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def _no_naiad_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of whoever runs the tests do not reach them."""
    for name in list(os.environ):
        if name.startswith("NAIAD_"):
            monkeypatch.delenv(name)
