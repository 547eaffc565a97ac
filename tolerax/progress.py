"""Progress of a run: a bar, log records, or nothing.

Anything with the three methods of [`Progress`][] can be shown progress. `resolve` turns what a user
passes as `progress=` into one. Progress never changes a run: what it raises is logged once and
otherwise ignored.
"""

import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, SupportsFloat, SupportsInt, cast, runtime_checkable

from jaxtyping import ArrayLike

logger = logging.getLogger("tolerax")
logger.addHandler(logging.NullHandler())

Scalars = Mapping[str, ArrayLike]


@runtime_checkable
class Progress(Protocol):
    """What is told about a run. Calls never overlap, but may come from another thread.

    - `start(total, description)`: a run of at most `total` steps begins (`None`: no limit known).
    - `update(step, **scalars)`: `step` steps are done; scalars such as `value` are named.
    - `close(message)`: the run is over.

    A loop that is compiled whole by its caller (`jax.jit` around `solve`) calls `start` with its
    first `update`, which comes after 20 steps or at the end.
    """

    def start(self, total: int | None, description: str) -> None:
        """A run of at most `total` steps begins."""
        ...

    def update(self, step: int, **scalars: float) -> None:
        """`step` steps are done."""
        ...

    def close(self, message: str) -> None:
        """The run is over."""
        ...


class _Guarded:
    """Calls `_start`, `_update` and `_close` one at a time, and lets no exception out."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._has_failed = False

    def start(self, total: int | None, description: str) -> None:
        """A run of at most `total` steps begins."""
        self._guard(lambda: self._start(total, description))

    def update(self, step: SupportsInt, **scalars: SupportsFloat) -> None:
        """`step` steps are done."""

        def update() -> None:
            self._update(int(step), {name: float(value) for name, value in scalars.items()})

        self._guard(update)

    def close(self, message: str = "") -> None:
        """The run is over. Closing twice does nothing."""
        self._guard(lambda: self._close(message))

    def _guard(self, call: Callable[[], None]) -> None:
        with self._lock:
            try:
                call()
            except Exception:
                if not self._has_failed:
                    self._has_failed = True
                    logger.exception(
                        "Progress %r raised. The run goes on; further failures are not logged.",
                        self,
                    )

    def _start(self, total: int | None, description: str) -> None:
        raise NotImplementedError

    def _update(self, step: int, scalars: dict[str, float]) -> None:
        raise NotImplementedError

    def _close(self, message: str) -> None:
        raise NotImplementedError


class Silent:
    """Shows nothing; a compiled loop that is given it contains no callback."""

    def start(self, total: int | None, description: str) -> None:
        """Nothing."""

    def update(self, step: SupportsInt, **scalars: SupportsFloat) -> None:
        """Nothing."""

    def close(self, message: str = "") -> None:
        """Nothing."""


class _Relayed(_Guarded):
    """An object of the user's; it gets every update, as Python numbers."""

    def __init__(self, target: Progress):
        super().__init__()
        self.target = target

    def __repr__(self) -> str:
        return repr(self.target)

    def _start(self, total: int | None, description: str) -> None:
        self.target.start(total, description)

    def _update(self, step: int, scalars: dict[str, float]) -> None:
        self.target.update(step, **scalars)

    def _close(self, message: str) -> None:
        self.target.close(message)


class _Called(_Guarded):
    """A callable of the user's, `function(step, **scalars)`; it gets every update."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def __repr__(self) -> str:
        return repr(self.function)

    def _start(self, total: int | None, description: str) -> None:
        pass

    def _update(self, step: int, scalars: dict[str, float]) -> None:
        self.function(step, **scalars)

    def _close(self, message: str) -> None:
        pass


class _Throttled(_Guarded):
    """Draws at most once in `interval` seconds; the last update is drawn on closing.

    An update after closing begins again with the last total and description, because the second
    call of a compiled function has no `start`.
    """

    def __init__(self, interval: float, clock: Callable[[], float]):
        super().__init__()
        if not interval >= 0:
            raise ValueError(f"interval must be at least 0 seconds, got {interval}.")
        self._interval = interval
        self._clock = clock
        self._total: int | None = None
        self._description = ""
        self._latest: tuple[int, dict[str, float]] | None = None
        self._is_open = False
        self._began = self._drawn = 0.0

    def _start(self, total: int | None, description: str) -> None:
        if self._is_open:
            self._close("")
        self._total, self._description = total, description
        self._begin()

    def _begin(self) -> None:
        self._latest = None
        self._is_open = True
        self._began = self._clock()
        self._drawn = -float("inf")
        self._open()

    def _update(self, step: int, scalars: dict[str, float]) -> None:
        if not self._is_open:
            self._begin()
        self._latest = step, scalars
        now = self._clock()
        if now - self._drawn >= self._interval:
            self._drawn = now
            self._latest = None
            self._draw(step, scalars)

    def _close(self, message: str) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            if self._latest is not None:
                self._draw(*self._latest)
        finally:
            self._latest = None
            self._end(message)

    def _line(self, step: int, scalars: dict[str, float]) -> str:
        parts = [f"{self._description}:"] if self._description else []
        if self._total:
            parts.append(f"{step}/{self._total} ({100 * step / self._total:.0f} %)")
        else:
            parts.append(f"step {step}")
        parts += [f"{name}={value:.4g}" for name, value in scalars.items()]
        return " ".join([*parts, f"[{self._clock() - self._began:.1f} s]"])

    def _open(self) -> None:
        raise NotImplementedError

    def _draw(self, step: int, scalars: dict[str, float]) -> None:
        raise NotImplementedError

    def _end(self, message: str) -> None:
        raise NotImplementedError


class LogProgress(_Throttled):
    """Progress as records of the standard logger "tolerax", at most one in `interval` seconds.

    As usual in Python nothing appears until the application sets logging up:

    >>> import logging, sys
    >>> handler = logging.StreamHandler(sys.stdout)
    >>> logging.getLogger("tolerax").addHandler(handler)
    >>> logging.getLogger("tolerax").setLevel(logging.INFO)
    >>> progress = LogProgress(clock=lambda: 0.0)
    >>> progress.start(10, "descent")
    descent: started, at most 10 steps
    >>> progress.update(1, value=0.5)
    descent: 1/10 (10 %) value=0.5 [0.0 s]
    >>> progress.close("converged")
    descent: converged

    >>> logging.getLogger("tolerax").removeHandler(handler)
    >>> logging.getLogger("tolerax").setLevel(logging.NOTSET)
    """

    def __init__(
        self,
        level: int = logging.INFO,
        interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(interval, clock)
        self._level = level

    def _open(self) -> None:
        limit = "" if self._total is None else f", at most {self._total} steps"
        logger.log(self._level, "%s: started%s", self._description or "run", limit)

    def _draw(self, step: int, scalars: dict[str, float]) -> None:
        logger.log(self._level, "%s", self._line(step, scalars))

    def _end(self, message: str) -> None:
        logger.log(self._level, "%s: %s", self._description or "run", message or "ended")


class ProgressBar(_Throttled):
    """A bar on standard error, or on the text stream `file`.

    - `style`: "tqdm" asks for tqdm (an error if it is not installed), "text" for plain text, "auto"
      for tqdm where it is installed. Plain text rewrites one line on a terminal; elsewhere it
      writes whole lines, less often.
    - `interval`: seconds between two drawings; 0.1, or 1.0 for whole lines, unless given.

    >>> import sys
    >>> bar = ProgressBar(style="text", file=sys.stdout, clock=lambda: 0.0)
    >>> bar.start(4, "descent")
    >>> for step in range(1, 5):
    ...     bar.update(step, value=1 / step)
    descent: 1/4 (25 %) value=1 [0.0 s]
    >>> bar.close("converged")
    descent: 4/4 (100 %) value=0.25 [0.0 s]
    converged
    """

    def __init__(
        self,
        style: str = "auto",
        file: Any = None,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if style not in ("auto", "tqdm", "text"):
            raise ValueError(f'style must be "auto", "tqdm" or "text", got {style!r}.')
        self._tqdm = None if style == "text" else _find_tqdm(required=style == "tqdm")
        self._file = file
        if interval is None:
            rewrites = self._tqdm is not None or _is_terminal(file or sys.stderr)
            interval = 0.1 if rewrites else 1.0
        super().__init__(interval, clock)
        self._bar: Any = None
        self._width = 0

    def _open(self) -> None:
        self._width = 0
        if self._tqdm is not None:
            self._bar = self._tqdm(
                total=self._total,
                desc=self._description or None,
                file=self._stream,
                unit="step",
                # We decide when to draw.
                mininterval=0,
                dynamic_ncols=True,
            )

    @property
    def _stream(self) -> Any:
        # Looked up late, so that a redirected stderr is honoured.
        return sys.stderr if self._file is None else self._file

    def _draw(self, step: int, scalars: dict[str, float]) -> None:
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix(
                {name: f"{value:.4g}" for name, value in scalars.items()}, refresh=False
            )
            self._bar.refresh()
        elif _is_terminal(self._stream):
            # A line that wraps cannot be rewritten.
            line = self._line(step, scalars)[: max(shutil.get_terminal_size().columns - 1, 1)]
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
            self._stream.flush()
        else:
            self._stream.write(self._line(step, scalars) + "\n")
            self._stream.flush()

    def _end(self, message: str) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()
        elif self._width:
            self._stream.write("\n")
        if message:
            self._stream.write(message + "\n")
        self._stream.flush()


def _is_terminal(stream: Any) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # no such method; closed
        return False


def _find_tqdm(required: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        if required:
            raise ImportError(
                'ProgressBar(style="tqdm") needs tqdm, which is not installed: run '
                '`pip install tqdm`, or use style="text".'
            ) from error
        return None
    return tqdm


def resolve(progress: Any) -> Progress:
    """What a user passes as `progress=`, as a [`Progress`][] that never raises.

    - `None`, `False`, "silent": nothing; `True`, "bar": a [`ProgressBar`][]; "log": a
      [`LogProgress`][];
    - an object with the methods of [`Progress`][], or a callable `(step, **scalars)`: it is told
      of every update, in the order in which they arrive, one at a time.

    Raises `TypeError` (`ValueError` for a string) when it is none of these.

    >>> resolve(None)
    <tolerax.progress.Silent object at ...>
    >>> resolve(lambda step, **scalars: print(step, scalars)).update(3, value=0.5)
    3 {'value': 0.5}
    """
    if isinstance(progress, Silent | _Guarded):
        return cast(Progress, progress)
    if progress is None or progress is False:
        return Silent()
    if progress is True:
        return cast(Progress, ProgressBar())
    accepted = (
        'None, True, "bar", "log", "silent", an object with the methods start, update and close, '
        "or a callable (step, **scalars)"
    )
    if isinstance(progress, str):
        named = {"silent": Silent, "bar": ProgressBar, "log": LogProgress}
        if progress not in named:
            raise ValueError(f"progress is {progress!r}: it must be {accepted}.")
        return cast(Progress, named[progress]())
    if isinstance(progress, type):
        raise TypeError(
            f"progress is the class {progress.__name__}: pass an instance, {progress.__name__}()."
        )
    methods = [callable(getattr(progress, name, None)) for name in ("start", "update", "close")]
    if all(methods):
        return cast(Progress, _Relayed(progress))
    if callable(progress) and not any(methods):
        return cast(Progress, _Called(progress))
    raise TypeError(f"progress is {progress!r}: it must be {accepted}.")


__all__ = [
    "LogProgress",
    "Progress",
    "ProgressBar",
    "Silent",
    "resolve",
]
