"""How the driver follows a gang: it hands on what the ranks say, and whatever interrupts that ends them."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.logs import TOLD
from cluster.mailbox import Mailbox
from cluster.meter import Usage
from cluster.standing import STANDING
from cluster.story import Story

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_TELL_SECONDS, _LEAVE_SECONDS = 1.0, 60.0


def follow(
    launch: threading.Thread,
    mailbox: Mailbox,
    name: str,
    story: Story,
    on_report: Callable[[dict[str, Any]], None],
    on_note: Callable[[str], None],
    spent: Callable[[Usage], None],
) -> None:
    """Hand on reports until the run ends; whatever interrupts this ends the run too.

    Where ``spent`` raises, the ranks are asked to save what they have done first.
    """
    ranks: list[Any] = []
    told = story.started

    def deliver() -> None:
        mail = mailbox.take(name)
        story.take(mail, time.perf_counter())
        ranks.extend(mail.ranks)
        for kind, times in mail.survived.items():
            STANDING.survived(kind, times)
        for text in mail.notes:
            _log.warning("%s", text, extra=TOLD)
            on_note(text)
        if mail.waits or mail.sizes:
            STANDING.waiting = None if mail.sizes else mail.waits
        for values in mail.reports:
            on_report(values)

    def tell(usage: Usage) -> None:
        try:
            spent(usage)
        except Exception:
            # Whoever stops the work for what it has used wants what is done by now to be kept.
            mailbox.leave(name)
            launch.join(_LEAVE_SECONDS)
            raise

    try:
        while launch.is_alive():
            launch.join(_POLL_SECONDS)
            deliver()
            now = time.perf_counter()
            if now - told >= _TELL_SECONDS:
                told = now
                tell(story.usage(now))
        deliver()
    except BaseException:
        mailbox.stop(name)
        for handle in ranks + mailbox.take(name).ranks:
            ray.kill(handle)
        launch.join(30.0)
        raise
