"""For the tests of what lies in ``integrations/``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "membership")]  # launches; servers.*; etcd_server
