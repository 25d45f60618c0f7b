"""What the tests of this folder try out lies beside them in ``mutants``, ``mutant_runs`` and
``mutant_campaign``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
