"""What a person sees while a fleet starts: steps that begin, end, take so many seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Prints one line per finished step and keeps its duration.

    Args:
        console: where to print.

    Attributes:
        seconds: duration by step, in order.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Time a step and print it when it is over."""
        started = time.monotonic()
        spinner = (
            self.console.status(f"{title} ...") if self.console.is_terminal else contextlib.nullcontext()
        )
        try:
            with spinner:
                yield
        except BaseException:
            self.console.print(f"  [red]x[/red] {title}  {time.monotonic() - started:.1f} s", highlight=False)
            raise
        self.seconds[title] = time.monotonic() - started
        self.console.print(f"  [green]ok[/green] {title}  {self.seconds[title]:.1f} s", highlight=False)

    @contextlib.contextmanager
    def bar(self, total: int) -> Iterator[Callable[[], None]]:
        """Yield a function that counts one of `total`; shown as a bar on a terminal."""
        columns = (TextColumn("    "), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        task = shown.add_task("", total=total)
        with shown:
            yield lambda: shown.advance(task)

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
