"""Projections, norms, embeddings and the head: every body against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from naiad.engine.batch import RowInput, StepBatch, build_batch
from naiad.engine.ops import cpu, reference
from naiad.engine.ops.base import Bodies
from naiad.engine.ops.table import ALL, OpTable
from naiad.engine.spec import Activation
from tests.engine.ops.cases import (
    BOUNDS,
    CPU,
    Random,
    poisoned_memory,
    relative_error,
    target,
)

FAST = [bodies for bodies in ALL.values() if bodies is not reference.BODIES]
every_body = pytest.mark.parametrize("bodies", FAST, ids=lambda bodies: bodies.name)
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)

num_rows = st.integers(1, 9)
seeds = st.integers(0, 1000)
widths = st.sampled_from([8, 48, 64, 96])
activations: Any = st.sampled_from([None, "silu", "gelu", "gelu_tanh", "relu"])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def prepared(kind: str, bodies: Bodies, *arguments: Any, dtype: torch.dtype) -> Any:
    """A body, or a skip where it accepts no such thing on this machine."""
    body = getattr(bodies, kind).prepare(*arguments, target(dtype))
    if body is None:
        pytest.skip(f"{bodies.name} has no {kind} for {dtype} here")
    return body


@every_body
@every_dtype
@given(
    seed=seeds,
    rows=num_rows,
    width=widths,
    out=widths,
    kind=st.sampled_from(["rms", "layer"]),
    bias=st.booleans(),
    activation=activations,
    gated=st.booleans(),
)
@settings(max_examples=40)
def test_norm_linear_is_that_of_the_reference(
    bodies: Bodies,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    width: int,
    out: int,
    kind: str,
    bias: bool,
    activation: Activation | None,
    gated: bool,
) -> None:
    gated = gated and activation is not None
    random = Random(seed, dtype)
    arguments = random.norm(kind, width), random.linear(out, width, bias=bias), activation, gated
    x = random.normal(rows, width, std=3.0)
    before = x.clone()
    body = prepared("norm_linear", bodies, *arguments, dtype=dtype)

    found = body.run(x)

    specification = reference.ReferenceNormLinear.prepare(*arguments, target(torch.float32))
    wanted = specification.run(before.float())
    assert found.shape == (rows, out // 2 if gated else out)
    assert found.dtype == dtype
    assert relative_error(found, wanted) < BOUNDS[dtype]
    assert torch.equal(x, before), "the input is only read"


@every_body
@every_dtype
@given(seed=seeds, rows=num_rows, width=widths, hidden=widths, bias=st.booleans())
@settings(max_examples=20)
def test_linear_residual_is_that_of_the_reference(
    bodies: Bodies, dtype: torch.dtype, seed: int, rows: int, width: int, hidden: int, bias: bool
) -> None:
    random = Random(seed, dtype)
    linear = random.linear(hidden, width, bias=bias)
    x, residual = random.normal(rows, width), random.normal(rows, hidden, std=3.0)
    body = prepared("linear_residual", bodies, linear, dtype=dtype)
    specification = reference.ReferenceLinearResidual.prepare(linear, target(torch.float32))
    wanted = specification.run(x.float(), residual.float())

    found = body.run(x, residual)

    assert found.dtype == dtype
    assert relative_error(found, wanted) < BOUNDS[dtype]


@every_body
@every_dtype
@pytest.mark.parametrize("padded_rows", cpu.ROW_CHOICES)
@given(seed=seeds, rows=num_rows, kind=st.sampled_from(["rms", "layer"]))
@settings(max_examples=10)
def test_logits_are_those_of_the_reference_whatever_the_padding(
    bodies: Bodies, dtype: torch.dtype, padded_rows: int, seed: int, rows: int, kind: str
) -> None:
    random = Random(seed, dtype)
    norm, head = random.norm(kind, 64), random.normal(300, 64)
    x = random.normal(rows, 64)
    body = prepared("logits", bodies, norm, head, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.PADDING, "rows", padded_rows)
        found = body.run(x)

    wanted = reference.ReferenceLogits.prepare(norm, head, target(torch.float32)).run(x.float())
    assert found.shape == (rows, 300)
    assert relative_error(found, wanted) < BOUNDS[dtype]


def step_of(*token_ids: int, start: int = 0) -> StepBatch:
    return build_batch([RowInput(token_ids, start, [0], samples=True)], 64, CPU)


@every_body
@pytest.mark.parametrize("padded_rows", cpu.ROW_CHOICES)
@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5])
def test_embed_is_that_of_the_reference_with_finite_padding(
    bodies: Bodies, num_tokens: int, has_positions: bool, padded_rows: int
) -> None:
    random = Random(0)
    table, positions = random.normal(50, 16), random.normal(64, 16) if has_positions else None
    body = prepared("embed", bodies, table, positions, dtype=torch.float32)
    batch = step_of(*range(7, 7 + num_tokens), start=11)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.PADDING, "rows", padded_rows)
        found = body.run(batch)

    wanted = reference.ReferenceEmbed.prepare(table, positions, target(torch.float32)).run(batch)
    assert len(found) == max(num_tokens, padded_rows)
    assert torch.equal(found[:num_tokens], wanted)
    assert bool(found.isfinite().all())


def test_the_reference_is_what_its_parts_say() -> None:
    random = Random(1)
    x = random.normal(3, 16)
    norm, linear = random.norm("layer", 16), random.linear(8, 16, bias=True)
    assert linear.bias is not None
    assert norm.bias is not None

    found = reference.ReferenceNormLinear.prepare(
        norm, linear, "silu", gated=True, to=target(torch.float32)
    ).run(x)

    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = (scaled * norm.weight + norm.bias) @ linear.weight.T + linear.bias
    torch.testing.assert_close(found, y[:, :4] * y[:, :4].sigmoid() * y[:, 4:])
    squared = x.square().mean(-1, keepdim=True)
    rms = random.norm("rms", 16)
    torch.testing.assert_close(
        reference.normalise(x, rms), x / (squared + 1e-5).sqrt() * rms.weight
    )


@pytest.mark.parametrize(
    ("activation", "wanted"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x * x.sigmoid()),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        (
            "gelu_tanh",
            lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        ),
    ],
)
def test_activations_are_their_formulas(activation: Activation, wanted: Any) -> None:
    x = torch.linspace(-5, 5, 101)

    torch.testing.assert_close(reference.activate(x, activation), wanted(x), atol=1e-6, rtol=1e-5)


def test_the_table_asks_for_the_devices_bodies_first_and_the_reference_last() -> None:
    linear = Random(0).linear(8, 8, bias=False)

    def made(prefer: str, dtype: torch.dtype = torch.float32) -> str:
        return type(OpTable(prefer, target(dtype)).linear_residual(linear)).__name__

    assert made("reference") == "ReferenceLinearResidual"
    assert made("auto", torch.float64) == "ReferenceLinearResidual", "no body takes doubles"
    if torch.backends.mkldnn.is_available():
        assert made("auto") == made("cpu") == "CpuLinearResidual"


def test_tuning_settles_on_one_of_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.PADDING, "rows", 2)
    weight = Random(0).normal(64, 64)
    seen: list[int] = []

    def project(rows: int) -> None:
        seen.append(rows)
        F.linear(torch.ones(rows, 64), weight)

    cpu.tune(project)

    assert cpu.PADDING.rows in cpu.ROW_CHOICES
    assert set(seen) == set(cpu.ROW_CHOICES)
