"""Counters, gauges and histograms, and their one exposition in Prometheus' text format.

Updating costs about a tenth of a microsecond: keep the child that `Family.labels` returns. Children
take no lock: one thread updates a child, any thread may read it, and a scrape may see a histogram's
count one observation ahead of its sum. This module opens no port and knows no metric's name;
whoever measures owns families and registers a source of them.

The text is written here, not by prometheus_client: its writer appends `_total` to the name of every
counter, and Triton's counters (`nv_inference_request_success`) have none. Its parser reads the
result back in the tests.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Generic, TypeVar

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, tuple[tuple[str, str], ...], float]
"""Suffix of the metric's name, labels beside the family's own, value."""


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)
    type_name: ClassVar[str] = "counter"

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Add `amount`, which must not be negative."""
        self.value += amount

    def samples(self) -> Iterator[Sample]:
        """What a scrape reports."""
        yield "", (), self.value


class Gauge:
    """A number that is what it was last set to."""

    __slots__ = ("value",)
    type_name: ClassVar[str] = "gauge"

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        """Replace the value."""
        self.value = value

    def samples(self) -> Iterator[Sample]:
        """What a scrape reports."""
        yield "", (), self.value


class Histogram:
    """How many observations fell at or below each bound, their number and their sum.

    Args:
        buckets: Upper bounds, strictly ascending, without infinity.
    """

    __slots__ = ("bounds", "counts", "sum")
    type_name: ClassVar[str] = "histogram"

    def __init__(self, buckets: Sequence[float]) -> None:
        if not buckets or any(low >= high for low, high in pairwise(buckets)):
            raise ValueError(f"histogram buckets must strictly ascend, got {list(buckets)}")
        self.bounds = tuple(float(bound) for bound in buckets)
        self.counts = [0] * (len(self.bounds) + 1)  # per bucket, not cumulative; last: above all
        self.sum: float = 0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[Sample]:
        """What a scrape reports: cumulative buckets, count and sum."""
        counts = list(accumulate(self.counts))
        for bound, count in zip((*self.bounds, math.inf), counts, strict=True):
            yield "_bucket", (("le", _number(bound)),), count
        yield "_count", (), counts[-1]
        yield "_sum", (), self.sum


Child = TypeVar("Child", Counter, Gauge, Histogram)


class Family(Generic[Child]):
    """One metric: a name, its help, its label names and a child per combination of label values.

    Args:
        name: Exactly as exposed; nothing is appended to a counter's.
        help: One line for whoever reads the exposition.
        kind: `Counter`, `Gauge` or `Histogram`.
        label_names: Empty for a metric without labels, whose only child is `labels()`.
        buckets: Upper bounds of a histogram; only and always with `Histogram`.
    """

    def __init__(
        self,
        name: str,
        help: str,
        kind: type[Child],
        label_names: Sequence[str] = (),
        buckets: Sequence[float] | None = None,
    ) -> None:
        if (kind is Histogram) != (buckets is not None):
            raise ValueError(f"{name}: a histogram needs buckets, and nothing else has them")
        self.name = name
        self.help = help
        self.kind: type[Child] = kind
        self.label_names = tuple(label_names)
        self._arguments: tuple[Any, ...] = () if buckets is None else (tuple(buckets),)
        self._children: dict[tuple[str, ...], Child] = {}

    def labels(self, *values: str) -> Child:
        """The child with these label values, in the order of `label_names`; made on first use."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has labels {self.label_names}, got {values}")
            child = self._children.setdefault(values, self.kind(*self._arguments))
        return child

    def remove(self, *values: str) -> None:
        """Forget the child with these label values, if there is one."""
        self._children.pop(values, None)

    def children(self) -> list[tuple[tuple[str, ...], Child]]:
        """Label values and child of everything measured, oldest first; a copy."""
        return list(self._children.items())


AnyFamily = Family[Counter] | Family[Gauge] | Family[Histogram]


class Registry:
    """The sources of one process's metrics."""

    def __init__(self) -> None:
        self._sources: list[Callable[[], Iterable[AnyFamily]]] = []

    def register(self, source: Callable[[], Iterable[AnyFamily]]) -> None:
        """Ask `source` for families at every scrape; it runs in the thread that scrapes.

        Several sources may yield families of one name (one per model): they appear as one.
        """
        self._sources.append(source)

    def exposition(self) -> bytes:
        """Every family in Prometheus' text format 0.0.4, to be sent as `CONTENT_TYPE`.

        Raises:
            ValueError: two families of one name differ in kind.
        """
        by_name: dict[str, list[AnyFamily]] = {}
        for source in self._sources:
            for family in source():
                by_name.setdefault(family.name, []).append(family)
        lines = [line for families in by_name.values() for line in _lines(families)]
        return "".join(lines).encode()


def _lines(families: list[AnyFamily]) -> Iterator[str]:
    """The block of one name."""
    first = families[0]
    if any(family.kind is not first.kind for family in families):
        raise ValueError(f"metric {first.name} is registered with different kinds")
    yield f"# HELP {first.name} {_escape(first.help)}\n"
    yield f"# TYPE {first.name} {first.kind.type_name}\n"
    for family in families:
        for values, child in family.children():
            labels = tuple(zip(family.label_names, values, strict=True))
            for suffix, extra, value in child.samples():
                text = ",".join(f'{k}="{_escape(v, quotes=True)}"' for k, v in labels + extra)
                braces = f"{{{text}}}" if text else ""
                yield f"{first.name}{suffix}{braces} {_number(value)}\n"


def _escape(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
