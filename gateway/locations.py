"""Where families, added models and checkpoints are kept: in the checkout, or in the user's data directory once the
package is installed."""

from pathlib import Path

try:
    HOME = Path.home()
except RuntimeError:  # this user has none: what is in it is not there
    HOME = Path("/nonexistent")
PACKAGE = Path(__file__).resolve().parent.parent  # the checkout, or site-packages/triton_embed
DATA = PACKAGE if (PACKAGE / "pyproject.toml").is_file() else HOME / ".local" / "share" / "triton-embed"

FAMILIES = PACKAGE / "model_repository"
MODELS = DATA / "model_repository"  # where `add-model` writes
CHECKPOINTS = DATA / "checkpoints"
