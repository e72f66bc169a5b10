"""What the weights of a family demand: facts no checkpoint file states. No torch here, so that a family
without a checkpoint costs nothing."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class EncoderSpec:
    """A bidirectional post-norm encoder with learned positions (BERT)."""

    network: str = "encoder.Encoder"

    def load_network(self) -> Any:
        """The network's class; only this imports torch."""
        module, name = self.network.split(".")
        return getattr(import_module(f"triton_embed.python_backend.{module}"), name)
