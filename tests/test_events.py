"""Events in the program's own log: alarms are seen whatever the program configures there."""

from __future__ import annotations

import io
import logging
import logging.config
from collections.abc import Iterator

import pytest

from ckpt.events import Event, emit_to_logging, log_warning

ALARM = Event("save-failed", "a snapshot did not become durable", {"step": 3}, alarm=True)
TOLD = "[rank 1] a snapshot did not become durable (step=3)\n"


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """What the root logger's only handler writes, as a program's configuration leaves it."""
    root, logger = logging.getLogger(), logging.getLogger("ckpt")
    before = root.handlers[:], root.level, logger.level, logger.filters[:]
    written = io.StringIO()
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": True,
            "handlers": {"here": {"class": "logging.StreamHandler", "stream": written}},
            "root": {"level": "INFO", "handlers": ["here"]},
        }
    )
    yield written
    root.handlers[:], root.level = before[0], before[1]
    logger.setLevel(before[2])
    logger.filters[:] = before[3]
    for one in logging.Logger.manager.loggerDict.values():
        if isinstance(one, logging.Logger):
            one.disabled = False


def test_alarm_reaches_the_output_once_where_configuration_disabled_the_logger(
    output: io.StringIO,
) -> None:
    assert logging.getLogger("ckpt").disabled
    emit = emit_to_logging(1)
    emit(ALARM)
    emit(Event("durable", "not an alarm"))
    assert output.getvalue() == TOLD
    logging.getLogger("ckpt").disabled = False
    emit(ALARM)
    assert output.getvalue() == TOLD * 2


def test_levels_filters_and_disable_are_the_programs_choice(output: io.StringIO) -> None:
    logger = logging.getLogger("ckpt")
    logging.disable(logging.WARNING)
    try:
        log_warning("disabled for all")
    finally:
        logging.disable(logging.NOTSET)
    logger.addFilter(lambda record: False)
    log_warning("filtered")
    logger.filters.clear()
    logger.setLevel(logging.ERROR)
    log_warning("below the level")
    assert output.getvalue() == ""
