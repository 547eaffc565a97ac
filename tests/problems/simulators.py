"""Simulators that break their workers, in a module that workers can import."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np


def bowl(x):
    return float(np.sum((x - 0.3) ** 2))


@dataclasses.dataclass(frozen=True)
class Simulator:
    """The bowl, with a fault where the first coordinate is above a threshold.

    A fault with a `folder` happens at the first evaluation of a point only, anywhere.
    """

    faults: tuple[tuple[float, str], ...] = ()
    folder: str | None = None

    def __call__(self, x):
        for threshold, fault in self.faults:
            if x[0] >= threshold and not self._happened(fault, x):
                getattr(self, fault)()
        return bowl(x)

    def _happened(self, fault, x):
        if self.folder is None:
            return False
        mark = Path(self.folder) / f"{fault}-{x.tobytes().hex()}"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return True
        return False

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(self):
        time.sleep(3600)

    def raises(self):
        raise Burst(1, 2)

    def ends(self):
        raise SystemExit(3)


class Burst(Exception):
    """Cannot be unpickled: it takes more arguments than it remembers."""

    def __init__(self, one, two):
        super().__init__(f"burst {one} {two}")
