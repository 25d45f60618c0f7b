"""For the tests of what lies in ``integrations/``."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
