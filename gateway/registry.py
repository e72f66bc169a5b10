"""What Triton serves, learnt from Triton alone: repository index, model configs, and each model's own INFO."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from triton_embed.gateway.client import IndexEntry, TritonClient
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.model import ModelInfo

log = logging.getLogger(__name__)

INFO_SECONDS = 2.0  # a model busy for longer keeps the card it has
REFRESH_GAP_SECONDS = 0.25  # what requests for unknown or broken models can cause, at most


@dataclass(frozen=True, slots=True)
class Card:
    """One model of Triton's repository. Without `info` it is not ready, and `reason` says why in one line."""

    name: str  # Triton's own: the directory
    version: str
    created: int  # Unix seconds, when the gateway first saw it
    names: tuple[str, ...] = ()  # what else it answers to: HF id, the id's last part, aliases
    info: ModelInfo | None = None
    reason: str = ""
    broken: bool = False  # Triton calls it ready, and yet it does not answer

    @property
    def checkpoint(self) -> str | None:
        """The Hugging Face id; None for a local directory."""
        return self.info.checkpoint if self.info else None


class Registry:
    """The models by name, kept fresh by one background task. Open with `start`, end with `stop`."""
