"""Places of this checkout."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = Path(os.environ.get("TRAINING_WHEELS_PAIR", ROOT / "deploy" / "demo"))
"""The pair that the integration tests serve."""
