"""What requests and replies of a serving group carry, and its reserved paths. Pure."""

from __future__ import annotations

GENERATION = "X-Ckpt-Generation"
"""In a reply: the generation that computed it. In a request: the one that must; else 409."""
REPLICA = "X-Ckpt-Replica"
"""In a reply: which replica computed it."""
NOT_HANDLED = "X-Ckpt-Not-Handled"
"""In a reply with 503: nothing of the request was begun, so any request may go elsewhere. Its value
is ``busy``, or ``away`` for one that leaves or has nothing to serve yet."""
BUSY = "busy"
AWAY = "away"
DEADLINE_MS = "X-Ckpt-Deadline-Ms"
"""In a request: in how many milliseconds its answer is of no use any more."""
IDEMPOTENCY_KEY = "Idempotency-Key"
"""In a request: it may be sent again, whatever its method."""
RETRY_AFTER = "Retry-After"

HEALTH = "/ckpt/health"
STATUS = "/ckpt/status"
METRICS = "/ckpt/metrics"

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
