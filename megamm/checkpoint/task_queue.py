"""Threads of the writer: queues of work in the background, and the keep-alive while work is in progress."""

import queue
import threading
import time
from collections.abc import Callable

ALIVE_SECONDS = 0.5


class TaskQueue:
    """A thread that runs functions one after the other, started at the first; errors go to threading.excepthook."""

    def __init__(self) -> None:
        self.things: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def do(self, thing: Callable[[], None]) -> None:
        """Queue a function."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, daemon=True)
            self.thread.start()
        self.things.put(thing)

    def _work(self) -> None:
        while (thing := self.things.get()) is not None:
            thing()

    def finish(self) -> None:
        """Wait until all queued functions have run."""
        self.things.put(None)
        if self.thread is not None:
            self.thread.join()


class KeepAlive:
    """While entered, a thread calls `say` every ALIVE_SECONDS: the other threads may be blocked in disk I/O."""

    def __init__(self, say: Callable[[], None]) -> None:
        self.say = say
        self.entered, self.lock, self.is_entered = 0, threading.Lock(), threading.Event()
        threading.Thread(target=self._say_alive, daemon=True).start()

    def __enter__(self) -> None:
        with self.lock:
            self.entered += 1
            self.is_entered.set()

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.entered -= 1
            if not self.entered:
                self.is_entered.clear()

    def _say_alive(self) -> None:
        while self.is_entered.wait():
            time.sleep(ALIVE_SECONDS)
            if self.is_entered.is_set():
                self.say()
