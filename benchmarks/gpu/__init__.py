"""GPU benchmark of the kernels and the model families.

It runs from a bare checkout too, on a machine without a package index: importing this package makes the checkout
importable as `triton_embed`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def importable() -> None:
    """Make `import triton_embed` resolve to this checkout. No-op if the package is already importable."""
    if "triton_embed" in sys.modules or find_spec("triton_embed") is not None:
        return
    package = ModuleType("triton_embed")
    package.__path__ = [str(ROOT)]
    sys.modules["triton_embed"] = package


importable()
