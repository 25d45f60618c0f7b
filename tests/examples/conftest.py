"""Examples are scripts, not a package: their folder is what Python would put on the path when it runs one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
