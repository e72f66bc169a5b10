"""Deduplication: identical rows are computed once, and every request that needs the vector gets it.

This covers rows within a request, rows of waiting requests, and rows in a running forward pass. Beyond that, vectors
are cached if the operator has set a cache size.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.scheduling.job import Job, Key, PendingRow
from triton_embed.python_backend.wire import Reused

Vector = npt.NDArray[np.float32]

ENTRY_BYTES = 150  # upper bound of the memory of an OrderedDict entry


class Cache:
    """A least-recently-used cache of vectors in at most `max_bytes`, keys included.

    Keys do not name the checkpoint, because a cache lives in the process of one loaded checkpoint.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._vectors: OrderedDict[Key, Vector] = OrderedDict()
        self.bytes = 0

    def get(self, key: Key) -> Vector | None:
        """Return a vector, which is read-only, or None."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: Key, vector: Vector) -> None:
        """Store a copy of a vector if it is finite and fits, and evict the least recently used ones."""
        if key in self._vectors or not np.isfinite(vector).all():
            return
        stored = vector.copy()
        stored.flags.writeable = False
        if (size := entry_bytes(key, stored)) > self._max_bytes:
            return
        self._vectors[key] = stored
        self.bytes += size
        while self.bytes > self._max_bytes:
            self.bytes -= entry_bytes(*self._vectors.popitem(last=False))


class DedupCache:
    """Pending rows and cached vectors. Not thread-safe: the scheduler holds its lock."""

    def __init__(self, cache_bytes: int = 0) -> None:
        self._pending: dict[Key, PendingRow] = {}
        self._cache = Cache(cache_bytes) if cache_bytes else None

    @property
    def cache_bytes(self) -> int:
        return self._cache.bytes if self._cache else 0

    def join(self, job: Job) -> int:
        """Fill a job's rows from the cache, and register the job for the pending rows of the rest.

        Returns:
            The number of rows that were cached.
        """
        missing_before = job.missing
        for key, indices in job.indices.items():
            if self._cache and (vector := self._cache.get(key)) is not None:
                job.fill(indices, vector)
                job.reused[indices] = Reused.CACHED
                continue
            pending = self._pending.get(key)
            if pending is None:
                pending = self._pending[key] = PendingRow(key, job.rows[indices[0]], job.dims)
            pending.jobs[job] = indices
            job.pending.append(pending)
        job.queue.extend(job.pending)
        return missing_before - job.missing

    def leave(self, job: Job) -> None:
        """Remove a job from its pending rows. Rows that other jobs need stay."""
        for pending in job.pending:
            pending.jobs.pop(job, None)
            if not pending.jobs and not pending.started:
                del self._pending[pending.key]

    def complete(self, pending_rows: Sequence[PendingRow], vectors: Iterable[Vector]) -> list[Job]:
        """Give the vectors to every job that needs them. Return the jobs that are complete."""
        complete = []
        for pending, vector in zip(pending_rows, vectors, strict=True):
            del self._pending[pending.key]
            if self._cache:
                self._cache.put(pending.key, vector)
            for job, indices in pending.jobs.items():
                job.fill(indices, vector)
                if not job.missing:
                    complete.append(job)
        return complete

    def jobs(self) -> set[Job]:
        """Return the jobs that are not complete."""
        return {job for pending in self._pending.values() for job in pending.jobs}

    def fail(self, pending_rows: Sequence[PendingRow]) -> set[Job]:
        """Remove rows whose computation failed. Return the jobs that needed them."""
        for pending in pending_rows:
            del self._pending[pending.key]
        return {job for pending in pending_rows for job in pending.jobs}


def entry_bytes(key: Key, vector: Vector) -> int:
    """Return the memory of a cache entry, including the dictionary's own."""
    return sum(map(sys.getsizeof, (key, *key, vector))) + ENTRY_BYTES
