"""Budget: how many tokens a forward pass may hold."""

from dataclasses import dataclass

ON_GPU = 16_384
# On a CPU a pass is large enough to be fast, and no larger, for who comes next waits for it. Measured on two cores:
# MiniLM embeds 5 to 10 % more tokens a second in passes of 4,096 than of 1,024, and a fifth more requests of 32 texts,
# which are calls of their own then; bge-large gains 4 %, Qwen3-0.6B nothing, in passes of 4 and 6 seconds.
ON_CPU, OF_SMALL_NETWORKS = 1_024, 4_096
SMALL_NETWORK = 2**25  # weights of linear layers, at most
# While small jobs come, passes over large ones are smaller. Measured with MiniLM on two cores, one query after another
# under bulk requests: its p99 goes from 40 ms to 13, and bulk is as fast, for threads that wait for each other had
# been waiting for all the rest too.
SHARED = 1 / 2  # of a pass, for such a one
# Of a pass: what a small job may cost, and what is computed of small jobs when a large pass pauses for them.
# Measured with MiniLM in fp32 on one thread, under bulk requests: with an eighth a query of 200 tokens takes 20 times
# as long as alone, with a quarter twice; one of 12 tokens takes the same with either.
SMALL = 1 / 4


@dataclass(frozen=True)
class Budget:
    """Tokens: of a `whole` pass, of one over large jobs that is `shared` with small ones, and of a `small` job."""

    whole: int
    shared: int
    small: int

    @classmethod
    def of(cls, device: str, weights: int, whole: int = 0) -> "Budget":
        """For a network with so many weights in its linear layers; `whole` 0: what suits it."""
        on_cpu = device == "cpu"
        if not whole:
            whole = ON_GPU if not on_cpu else OF_SMALL_NETWORKS if weights <= SMALL_NETWORK else ON_CPU
        usual = min(whole, ON_CPU) if on_cpu else whole  # a larger one changes nothing for small jobs
        return cls(whole, int(usual * SHARED), int(usual * SMALL))
