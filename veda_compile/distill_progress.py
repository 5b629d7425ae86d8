"""The progress line of a distillation."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .distiller import Distiller


class JobProgress:
    """A line on standard error that tells how far a distillation is; nothing off a terminal."""

    def __init__(self, learned: Distiller, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._learned = learned
        self._calls = -1
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task("distilling: waiting for the first call")

    def __enter__(self) -> JobProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self) -> None:
        """Show the learner's state; does nothing within one call of the model."""
        learned = self._learned
        if learned.calls == self._calls:
            return
        self._calls = learned.calls
        phase = "searching tile shapes"
        if learned.shapes:
            phase = "learning scores and budgets"
        self._progress.update(
            self._task,
            description=(
                f"distilling: {phase}; generation {learned.runs}, {learned.calls} calls, "
                f"{learned.measured} measured"
            ),
        )
