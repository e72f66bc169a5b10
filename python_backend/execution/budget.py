"""Token budgets of forward passes."""

from dataclasses import dataclass

# Tokens per forward pass, unless the operator sets max_batch_tokens. On a GPU a pass takes about GPU_SECONDS, because
# a query waits for it; with fewer tokens than the least the GPU is not used well, with more than the most no better.
LEAST_ON_GPU, MOST_ON_GPU = 1_024, 16_384
GPU_SECONDS = 0.025
GPU_UTILIZATION = 0.6  # of the rate of a large product
# On a CPU a pass is just large enough to be fast, because the next request waits for it (measured on 2 cores: MiniLM
# embeds 5 to 10 % more tokens per second in passes of 4,096 tokens than of 1,024, and about 20 % more requests of
# 32 texts, which then fit one call; bge-large gains 4 % and Qwen3-0.6B nothing, in passes of 4 and 6 seconds).
ON_CPU, ON_CPU_SMALL_NETWORK = 1_024, 4_096
SMALL_NETWORK_WEIGHTS = 2**25  # maximum number of weights in the linear layers of a small network
# While small jobs arrive, passes over large jobs are this fraction of a pass of ON_CPU tokens, because small jobs are
# computed in the pauses of a pass, and those of a smaller pass are closer together.
SHARED_FRACTION = 1 / 2
# A job is small up to this fraction of a pass, which also limits the small jobs computed in one pause (measured with
# MiniLM in fp32 on one thread, under bulk requests: with 1/8 a query of 200 tokens takes 20 times as long as alone,
# with 1/4 twice as long; one of 12 tokens takes the same with either).
SMALL_FRACTION = 1 / 4


@dataclass(frozen=True)
class Budget:
    """Limits in tokens.

    Attributes:
        pass_tokens: The limit of a forward pass.
        shared_pass_tokens: The limit of a pass over large jobs while small jobs arrive.
        small_job_tokens: The limit of a small job, and of the small jobs computed in one pause.
    """

    pass_tokens: int
    shared_pass_tokens: int
    small_job_tokens: int

    @classmethod
    def of(cls, device: str, weights: int, pass_tokens: int = 0, flops: float = 0.0) -> "Budget":
        """Return the budget of a network with this many weights in linear layers.

        Args:
            pass_tokens: The operator's limit; 0: chosen for the device and the network.
            flops: Floating-point operations per second of a large product on a GPU.
        """
        on_cpu = device == "cpu"
        if not pass_tokens and on_cpu:
            pass_tokens = ON_CPU_SMALL_NETWORK if weights <= SMALL_NETWORK_WEIGHTS else ON_CPU
        elif not pass_tokens:
            fitting = int(GPU_SECONDS * GPU_UTILIZATION * flops / (2 * weights))
            pass_tokens = min(max(fitting, LEAST_ON_GPU), MOST_ON_GPU)
        # Larger passes do not change the limits of small jobs.
        base = min(pass_tokens, ON_CPU) if on_cpu else pass_tokens
        return cls(pass_tokens, int(base * SHARED_FRACTION), int(base * SMALL_FRACTION))
