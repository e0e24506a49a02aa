"""What a long run shows, measures and listens to: progress, clock, signals; and how a command ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm


class Signals:
    """Turns Ctrl-C and SIGTERM into a wish that training looks at between two steps."""

    def __init__(self, wanted: bool) -> None:
        self.number: int | None = None
        self._before = {}
        if wanted and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.restore()  # a second signal does what it always does
        self.number = int(number)

    def wish(self) -> None:
        """The same wish without a signal, once or more and from any thread."""
        self.number = self.number or int(signal.SIGTERM)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Clock:
    """Seconds of training, without those spent in `paused`; and CPU seconds of this process, with them.

    `cpu_seconds` None: a run went on from a time when they were not counted, so that there is no sum.
    """

    def __init__(self, seconds: float = 0.0, cpu_seconds: float | None = 0.0) -> None:
        self._start = time.perf_counter() - seconds
        self._cpu_start = None if cpu_seconds is None else time.process_time() - cpu_seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def cpu_seconds(self) -> float | None:
        return None if self._cpu_start is None else time.process_time() - self._cpu_start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


class Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing if not `wanted`."""

    def __init__(self, first: int, steps: int, tokens_per_step: int, wanted: bool) -> None:
        self._bar = tqdm(total=steps, initial=first, unit="step", disable=None if wanted else True)
        self._lines = wanted and self._bar.disable
        self._first, self._steps, self._tokens = first, steps, tokens_per_step
        self._start = self._last = time.monotonic()

    def step(self) -> None:
        self._bar.update()

    def report(self, row: dict) -> None:
        """Show a line of the log."""
        step, now = row["step"], time.monotonic()
        speed = (step - self._first) * self._tokens / max(now - self._start, 1e-9)
        losses = " ".join(f"{name} {row[name]:.3f}" for name in ("train_next", "val_next") if name in row)
        text = f"{losses} {speed:,.0f} tokens/s"
        self._bar.set_postfix_str(text)
        if self._lines and (now - self._last > 30 or step == self._steps):
            left = (self._steps - step) * (now - self._start) / max(step - self._first, 1)
            note(f"step {step}/{self._steps} {text}, {tqdm.format_interval(left)} left")
            self._last = now

    def close(self) -> None:
        self._bar.close()


def note(text: str) -> None:
    """A line for people, on stderr, that does not tear a progress bar."""
    tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def told(*others: type[Exception]) -> Iterator[None]:
    """End the process with a line, "error: …", where a ValueError, an OSError or one of `others` would leave a
    traceback, and quietly, with exit status 130, at Ctrl-C. With VWN_REF_TRACEBACK in the environment errors pass."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, *others) as error:
        if "VWN_REF_TRACEBACK" in os.environ:
            raise
        sys.exit(f"error: {error}")
