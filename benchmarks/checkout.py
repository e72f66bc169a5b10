"""The sources as `triton_embed` where nothing is installed: a bare checkout, on a machine without a package index."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def importable() -> None:
    """Make `import triton_embed` find this checkout, unless it is installed or was made so already."""
    if "triton_embed" in sys.modules or find_spec("triton_embed") is not None:
        return
    package = ModuleType("triton_embed")
    package.__path__ = [str(ROOT)]
    sys.modules["triton_embed"] = package
