"""The reference connector: right, so the engine has to accept it in every scenario."""

from .reference_scheduler import ReferenceScheduler
from .reference_worker import ReferenceWorker

Scheduler = ReferenceScheduler
Worker = ReferenceWorker


class ReleasingScheduler(ReferenceScheduler):
    """Gives ended requests' blocks back at once and drops saves that come too late."""

    KEEPS_BLOCKS = False


class SynchronousScheduler(ReferenceScheduler):
    """Loads inside `start_load_kv`."""

    ASYNCHRONOUS = False
