"""KV cache of reference-counted pages with a prefix cache: which page holds what, no tensors.

A sequence owns a table of pages of `page_tokens` places each. Only full pages are ever shared; the
last, partial page of a prefix is copied into a page of its own (`KvCopy`), so nobody writes where
somebody else reads. A page that nobody references keeps its tokens matchable until it is evicted,
least recently used first. A sequence gives its pages back last one first, so that order is also
leaf first: a prefix outlives its continuations.

Evicting a page may leave continuations behind that no lookup reaches. They are found again as soon
as the same tokens are computed anew (chunks are named by content), or age out.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from naiad.engine.kv import hashing
from naiad.engine.kv.base import KvCopy
from naiad.engine.kv.prefix import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Run:
    """One live sequence: its pages, how many tokens it appended, digest of its last full page."""

    __slots__ = ("digest", "num_tokens", "pages")

    def __init__(self, pages: list[int], num_tokens: int, digest: bytes) -> None:
        self.pages = pages
        self.num_tokens = num_tokens
        self.digest = digest


class PageManager:
    """A `KvManager` over `num_pages` pages.

    Args:
        num_pages: Pages of the cache.
        page_tokens: Places of one page.
        prefix_cache: Whether tokens of ended or other live sequences are reused.
        min_copy_tokens: Shorter partial tails are computed again rather than copied; None: a quarter
            of a page, at most 16.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        *,
        prefix_cache: bool = True,
        min_copy_tokens: int | None = None,
    ) -> None:
        self._page_tokens = page_tokens
        self._index = PrefixIndex(page_tokens) if prefix_cache else None
        self._min_copy = min_copy_tokens or max(1, min(16, page_tokens // 4))
        self._live: dict[int, _Run] = {}
        self._copies: list[KvCopy] = []
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, oldest first
        # By page. A page has tokens here, and a place in the index, once something was appended.
        self._refs = [0] * num_pages
        self._tokens: list[list[int]] = [[] for _ in range(num_pages)]
        self._parents = [hashing.ROOT] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages

    @property
    def capacity_tokens(self) -> int:
        """Tokens that live sequences can hold together, before sharing."""
        return len(self._refs) * self._page_tokens

    @property
    def used_tokens(self) -> int:
        """Places of all referenced pages."""
        return (len(self._refs) - self._num_available()) * self._page_tokens

    def max_tokens_per_sequence(self) -> int:
        """The whole cache."""
        return self.capacity_tokens

    def match(self, sequence: int, token_ids: Sequence[int], spare_tokens: int = 0) -> int | None:
        """Share full pages of the longest cached prefix and copy the partial page behind them."""
        assert sequence not in self._live, f"sequence {sequence} already lives"
        limit = max(0, len(token_ids) - 1)
        digests = self._index.walk(token_ids, limit) if self._index else []
        pages = [self._index.holder(digest) for digest in digests] if self._index else []
        num_idle = sum(page in self._cached for page in pages)
        need = self._pages_for(len(token_ids)) - len(pages) + self._pages_for(spare_tokens)
        if need > self._num_available() - num_idle:
            return None
        for page in pages:
            self._reference(page)
        run = _Run(pages, len(pages) * self._page_tokens, digests[-1] if digests else hashing.ROOT)
        self._live[sequence] = run
        if self._index:
            self._match_tail(run, list(token_ids[run.num_tokens : limit][: self._page_tokens]))
        return run.num_tokens

    def fork(self, parent: int, child: int, num_tokens: int) -> bool:
        """Share the full pages of the first `num_tokens` tokens, copy the partial page."""
        source = self._live[parent]
        assert num_tokens <= source.num_tokens, "fork beyond what was appended"
        assert child not in self._live, f"sequence {child} already lives"
        num_full, num_tail = divmod(num_tokens, self._page_tokens)
        if num_tail and not self._num_available():
            return False
        pages = source.pages[:num_full]
        for page in pages:
            self._reference(page)
        digest = self._digests[pages[-1]] if pages else None
        run = _Run(pages, num_full * self._page_tokens, digest or hashing.ROOT)
        self._live[child] = run
        if num_tail:
            self._copy_tail(run, source.pages[num_full], num_tail)
        return True

    def reserve(self, sequence: int, num_tokens: int) -> bool:
        """Give `sequence` the pages for `num_tokens` tokens, evicting cached ones as needed."""
        pages = self._live[sequence].pages
        need = -(-num_tokens // self._page_tokens) - len(pages)
        if need <= 0:
            return True
        if need > len(self._free) + len(self._cached):
            return False
        pages.extend(self._take() for _ in range(need))
        return True

    def append(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Record written tokens; a page that they fill becomes shareable."""
        run = self._live[sequence]
        size = self._page_tokens
        assert run.num_tokens + len(token_ids) <= len(run.pages) * size, "append without reserve"
        if self._index is None:
            run.num_tokens += len(token_ids)
            return
        done = 0
        while done < len(token_ids):
            index, offset = divmod(run.num_tokens, size)
            part = token_ids[done : done + size - offset]
            page = run.pages[index]
            self._tokens[page].extend(part)
            run.num_tokens += len(part)
            done += len(part)
            if offset == 0:
                self._parents[page] = run.digest
                self._index.begin(run.digest, part[0], page)
            if offset + len(part) == size:
                run.digest = self._fill(page, run.digest)

    def free(self, sequence: int) -> None:
        """Drop the references of `sequence`; pages with tokens stay matchable until evicted."""
        for page in reversed(self._live.pop(sequence).pages):
            self._refs[page] -= 1
            if self._refs[page]:
                continue
            if self._tokens[page] and not self._is_redundant(page):
                self._cached[page] = None
            else:
                self._forget(page)
                self._free.append(page)

    def block_table(self, sequence: int) -> list[int]:
        """The live list of pages of `sequence`; read it, never change it."""
        return self._live[sequence].pages

    def take_released(self) -> list[int]:
        """None: pages do not grow, so their storage need not know."""
        return []

    def take_copies(self) -> list[KvCopy]:
        """The copy orders issued since the last call."""
        copies, self._copies = self._copies, []
        return copies

    def reset_prefix_cache(self) -> None:
        """Empty every page that no live sequence references."""
        while self._cached:
            self._free.append(self._evict())

    def check(self) -> None:
        """Recount references and index entries, and find every page in exactly one place."""
        counts = [0] * len(self._refs)
        for run in self._live.values():
            assert run.num_tokens <= len(run.pages) * self._page_tokens
            for page in run.pages:
                counts[page] += 1
        assert counts == self._refs, "reference counts are wrong"
        idle = [page for page, count in enumerate(counts) if not count]
        assert sorted([*self._free, *self._cached]) == idle, "a page is lost, or in two places"
        assert not any(self._tokens[page] for page in self._free), "a free page has tokens"
        assert all(self._tokens[page] for page in self._cached), "a cached page has no tokens"
        if self._index:
            begun = sum(1 for tokens in self._tokens if tokens)
            full = sum(1 for digest in self._digests if digest)
            for tokens, digest in zip(self._tokens, self._digests, strict=True):
                assert (len(tokens) == self._page_tokens) == (digest is not None)
            assert self._index.num_entries() == begun + full, "the prefix index is out of step"

    def _num_available(self) -> int:
        return len(self._free) + len(self._cached)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def _reference(self, page: int) -> None:
        if not self._refs[page]:
            del self._cached[page]
        self._refs[page] += 1

    def _take(self) -> int:
        """A page with one reference and no tokens. There must be one."""
        page = self._free.pop() if self._free else self._evict()
        self._refs[page] = 1
        return page

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        """Take `page` out of the index and empty it."""
        tokens = self._tokens[page]
        if tokens and self._index:
            self._unfill(page)
            self._index.drop_begun(self._parents[page], tokens[0], page)
            self._tokens[page] = []

    def _fill(self, page: int, parent: bytes) -> bytes:
        assert self._index is not None
        digest = hashing.chain(parent, self._tokens[page])
        self._digests[page] = digest
        self._index.fill(digest, page)
        return digest

    def _unfill(self, page: int) -> None:
        digest = self._digests[page]
        if digest is not None and self._index:
            self._index.drop_filled(digest, page)
            self._digests[page] = None

    def _is_redundant(self, page: int) -> bool:
        """Whether another page holds at least the same tokens behind the same prefix."""
        assert self._index is not None
        digest, tokens = self._digests[page], self._tokens[page]
        if digest is not None:
            return self._index.num_holders(digest) > 1
        return any(
            other != page and self._tokens[other][: len(tokens)] == tokens
            for other in self._index.begun(self._parents[page], tokens[0])
        )

    def _match_tail(self, run: _Run, wanted: list[int]) -> None:
        """Continue `run` within one page: the child page with most of `wanted`, taken or copied."""
        assert self._index is not None
        if not wanted:
            return
        best, source = 0, -1
        for page in self._index.begun(run.digest, wanted[0]):
            num_common = hashing.common_prefix(wanted, self._tokens[page])
            if num_common > best:
                best, source = num_common, page
        if best < self._min_copy:
            return
        idle = source in self._cached
        if idle and (best == len(self._tokens[source]) or self._num_available() == 1):
            self._adopt_tail(run, source, best)
        else:
            if idle:  # newest of at least two: taking a page for the copy does not evict it
                self._cached.move_to_end(source)
            self._copy_tail(run, source, best)

    def _adopt_tail(self, run: _Run, page: int, num_tokens: int) -> None:
        """Go on in an unreferenced page itself: nothing is lost by it, so nothing is copied."""
        self._reference(page)
        if num_tokens < self._page_tokens:
            self._unfill(page)
        del self._tokens[page][num_tokens:]
        run.pages.append(page)
        run.num_tokens += num_tokens

    def _copy_tail(self, run: _Run, source: int, num_tokens: int) -> None:
        tokens = self._tokens[source][:num_tokens]
        page = self._take()
        self._copies.append(KvCopy(source, page, num_tokens))
        run.pages.append(page)
        run.num_tokens += num_tokens
        if self._index:
            self._tokens[page] = tokens
            self._parents[page] = run.digest
            self._index.begin(run.digest, tokens[0], page)
