"""The contract between the engine and the gateway: names, parameters, codes, INFO, errors of inputs, and shared rules.

The gateway imports this file of the engine and no other. It needs the standard library only, because the gateway runs
without torch.
"""

# Input tensors
TEXT = "TEXT"
IMAGE = "IMAGE"
INPUT_IDS = "INPUT_IDS"

# Output tensors
EMBEDDING = "EMBEDDING"
TOKENS = "TOKENS"
DROPPED = "DROPPED"
REUSED = "REUSED"
ERROR = "ERROR"
INFO = "INFO"
IDS = "IDS"

# Request parameters and their types
PARAMETERS: dict[str, type] = {
    "dimensions": int,
    "instruction": str,
    "prompt_name": str,
    "prompts": str,
    "truncate": str,
    "long_text": str,
    "on_error": str,
    "timeout_ms": int,
}
# Parameters with a fixed set of values; the first is the default.
CHOICES = {"truncate": ("end", "start", "none"), "long_text": ("truncate", "mean"), "on_error": ("fail", "report")}
PROMPT_KEYS = ("instruction", "prompt_name")  # keys of an entry of prompts, which may have one of them
