"""A simulator that breaks its workers, in a module that workers can import."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np


def bowl(x):
    return float(np.sum((x - 0.3) ** 2))


class Burst(Exception):
    """Breaks an executor on its way home: it is made with more arguments than it remembers."""

    def __init__(self, one, two):
        super().__init__(f"burst {one} {two}")


class Died(BaseException):
    """What `FakePool` takes for the death of a worker."""


@dataclasses.dataclass(frozen=True)
class Simulator:
    """`bowl`, except at the points of `faults`, whose keys are their bytes in hexadecimal. What
    happened is noted in `folder`."""

    folder: str
    faults: tuple[tuple[str, str], ...] = ()

    def __call__(self, x):
        key = x.tobytes().hex()
        fault = dict(self.faults).get(key, "fine")
        with open(Path(self.folder) / f"{fault}-{key}", "a") as log:
            log.write(".")
            log.flush()
            times = log.tell()
        match fault:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "killed once" if times == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case "dies":
                raise Died
            case "dies once" if times == 1:
                raise Died
            case "hangs":
                time.sleep(3600)
            case "raises":
                raise Burst(1, 2)
            case "ends":
                raise SystemExit(3)
            case "nan":
                return np.nan
        return bowl(x)

    def calls(self):
        """How often each point was begun, with its fault."""
        return {
            tuple(path.name.split("-")): path.stat().st_size for path in Path(self.folder).iterdir()
        }

    def times(self, fault):
        """How often points with this fault were begun."""
        return sorted(n for (name, _), n in self.calls().items() if name == fault)


def key(x):
    return np.asarray(x).tobytes().hex()
