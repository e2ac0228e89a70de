"""Python's collector of reference cycles, run at the same step on every rank.

Left alone, it runs in each process at a time of its own. Each time all other ranks wait, so that with many ranks nearly
every step waits for one of them. A step of training leaves no cycle that holds a tensor (tests/test_garbage.py).
"""

import gc


class GarbageCollection:
    """Replaces the automatic collection from `begin` to `close`.

    every: steps between collections; 0: change nothing.
    """

    def __init__(self, every: int) -> None:
        self.every, self._begun = every, False

    def begin(self) -> None:
        """Collect what start-up has left; what remains is never looked at again."""
        if self.every and not self._begun:
            gc.collect()
            gc.freeze()
            gc.disable()
            self._begun = True

    def end_step(self, step: int) -> None:
        """Collect, if it is time for it after this step."""
        if self.every and step % self.every == 0:
            gc.collect()

    def close(self) -> None:
        """Restore the automatic collection."""
        if self._begun:
            gc.unfreeze()
            gc.enable()
            self._begun = False
