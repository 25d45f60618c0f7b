"""The call in which a process becomes a supervisor, and out of which its trainers come."""

from __future__ import annotations

import os
import traceback

from ckpt.elastic.processes.lifeline import Lifeline
from ckpt.elastic.processes.supervision import Supervision
from ckpt.elastic.processes.supervisor import Supervisor
from ckpt.elastic.processes.trainer import TrainerSeat
from ckpt.errors import CkptError, InternalError
from ckpt.ipc.frames import Wire


def supervise(link: Wire, plan: Supervision) -> TrainerSeat:
    """Become the supervisor of this rank; returns only in its trainers, each with its seat.

    ``link`` is a fresh connection to the keeper, owned from here on. Call it in the main thread. Raises what the keeper refuses
    the hello with, UnavailableError where it is gone before that; later errors end the process with a message.
    """
    lifeline = Lifeline(link, plan.hello, plan.reconnect)
    try:
        lifeline.greet(plan.hello.attempt)
    except BaseException:
        lifeline.lose()
        raise
    supervisor_pid = os.getpid()
    supervisor = Supervisor(lifeline, plan)
    try:
        return supervisor.run()
    except BaseException as error:
        if os.getpid() != supervisor_pid:  # a trainer that was interrupted on its way out of here
            raise
        if isinstance(error, CkptError):  # the program must not go on here: it goes on in its trainers
            supervisor.give_up(str(error), error.exit_code)
        supervisor.give_up(traceback.format_exc(), InternalError.exit_code)
