"""What a run shows while it runs: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich import progress
from rich.console import Console
from rich.markup import escape

from mbrl.experiments.recording import Recording
from mbrl.experiments.report import kept, measure, solved

_PLAIN_EVERY = 2.0  # seconds


class Progress:
    """Live progress of a control run of at most `steps` steps."""

    def __init__(self, console: Console, steps: int):
        self.console, self.steps = console, steps
        self._shown = time.monotonic()
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics.csv; plain lines come every two seconds at most."""
        done = row["step"] + 1
        line = f"return {row['return']:.2f}"
        if row["plan_ms"] is not None:
            line += f"  plan {row['plan_ms']:.1f} ms  {row['realtime_factor']:.2f}x real time"
            line += f"  latency {row['delay']}" if row["delay"] else ""
        self._bar.update(self._task, completed=done, description=line)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._shown > _PLAIN_EVERY or done == self.steps):
            self._shown = now
            self.console.print(f"step {done}/{self.steps}  {line}", highlight=False)


def show_facts(console: Console, recording: Recording, report: Path, video: Path | None) -> None:
    """Sum a finished run up."""
    facts = measure(recording)
    lines = [
        (
            "return",
            f"{facts['return']:.2f} in {facts['steps']:.0f} steps ({facts['seconds']:.2f} s simulated)",
        ),
        ("planning", f"{facts['plan_ms']:.1f} ms per plan, {facts['realtime']:.2f}x real time (medians)"),
        ("unusable plans", f"{facts['fallbacks']:.0f}"),
        *(("solver", line) for line in solved(recording)),
        *(("constraint", line) for line in kept(recording)),
        (
            "actions",
            f"{facts['gains']:.0f} with gains, {facts['plan']:.0f} of a plan alone, {facts['safe']:.0f} safe",
        ),
        ("metrics", str(report.with_name("metrics.csv"))),
        ("report", str(report)),
        *([] if video is None else [("video", str(video))]),
    ]
    for name, value in lines:
        console.print(f"[dim]{name:>14}[/dim]  {escape(value)}", highlight=False, soft_wrap=True)
