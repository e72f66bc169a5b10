"""No work twice: rows that are the same are computed once, and their vector goes to everyone who asked for it.

That holds within a request, among requests that wait and for rows that are being computed. Beyond that, vectors are
remembered where the operator gave them memory.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.job import CACHED, Flight, Job, Key

Vector = npt.NDArray[np.float32]

ENTRY_BYTES = 150  # of an OrderedDict's entry, at most


class Cache:
    """The vectors that were used last, in at most `limit` bytes, keys counted; 0: none.

    A key holds no name of the checkpoint: a cache lives in the process of one load of one checkpoint, and ends with it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._vectors: OrderedDict[Key, Vector] = OrderedDict()
        self.bytes = 0

    def get(self, key: Key) -> Vector | None:
        """Read-only."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: Key, vector: Vector) -> None:
        """Remember a copy of a vector that is finite and small enough; those used longest ago are forgotten for it."""
        if key in self._vectors or not np.isfinite(vector).all():
            return
        kept = vector.copy()
        kept.flags.writeable = False
        if (size := size_of(key, kept)) > self._limit:
            return
        self._vectors[key] = kept
        self.bytes += size
        while self.bytes > self._limit:
            self.bytes -= size_of(*self._vectors.popitem(last=False))


class Reuse:
    """The vectors on their way, and those in the cache. Not safe among threads: the scheduler holds its lock."""

    def __init__(self, cache_bytes: int = 0) -> None:
        self._flights: dict[Key, Flight] = {}
        self._cache = Cache(cache_bytes) if cache_bytes else None

    @property
    def cache_bytes(self) -> int:
        return self._cache.bytes if self._cache else 0

    def join(self, job: Job) -> int:
        """Give a job what is in the cache; for the rest it waits, with others that wait for the same.

        Returns how many of its rows were in the cache.
        """
        rows = job.left
        for key, places in job.places.items():
            if self._cache and (vector := self._cache.get(key)) is not None:
                job.fill(places, vector)
                job.reused[places] = CACHED
                continue
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = Flight(key, job.rows[places[0]], job.dims)
            flight.jobs[job] = places
            job.flights.append(flight)
        job.waiting.extend(job.flights)
        return rows - job.left

    def leave(self, job: Job) -> None:
        """A job waits no more. What others wait for stays on its way."""
        for flight in job.flights:
            flight.jobs.pop(job, None)
            if not flight.jobs and not flight.taken:
                del self._flights[flight.key]

    def land(self, flights: Sequence[Flight], vectors: Iterable[Vector]) -> list[Job]:
        """Hand the vectors to everyone who waits for them. Returns those who wait for nothing more."""
        complete = []
        for flight, vector in zip(flights, vectors, strict=True):
            del self._flights[flight.key]
            if self._cache:
                self._cache.put(flight.key, vector)
            for job, places in flight.jobs.items():
                job.fill(places, vector)
                if not job.left:
                    complete.append(job)
        return complete

    def fail(self, flights: Sequence[Flight]) -> set[Job]:
        """Nobody gets these vectors. Returns those who waited for them."""
        for flight in flights:
            del self._flights[flight.key]
        return {job for flight in flights for job in flight.jobs}


def size_of(key: Key, vector: Vector) -> int:
    """Bytes that an entry takes, its places in the dictionary and in the order of use included."""
    return sum(map(sys.getsizeof, (key, *key, vector))) + ENTRY_BYTES
