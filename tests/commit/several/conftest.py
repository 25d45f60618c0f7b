"""What the tests of this folder share lies beside them in ``log_world``, ``log_ledger``, ``log_people`` and ``log_stores``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
