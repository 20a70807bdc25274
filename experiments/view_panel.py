"""The panel beside the scene: what planning does, and what can be done to it and to the robot."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from html import escape
from queue import SimpleQueue
from typing import Any

import numpy as np
import viser
from viser import uplot

from mbrl.errors import MbrlError
from mbrl.experiments.session import LONGEST_PUSH, Pace, Session

KEPT = 300
"""Steps in the plots."""
NO_PLANS = "<br>A learned model tells what the task reads, not where bodies are: plans are not drawn."
TROUBLE = "color:#c0392b;padding:0 1em .5em;font-size:.85em"
DIRECTIONS = {
    "−x": (-1, 0, 0),
    "+x": (1, 0, 0),
    "−y": (0, -1, 0),
    "+y": (0, 1, 0),
    "up": (0, 0, 1),
}


class Panel:
    """Controls, which put what they ask for into `commands`, and numbers.

    viser calls back from threads of its own; the commands are run by the loop, between two steps.

    Attributes:
        commands: to run, in order.
        follow, candidates, restart: what is ticked.
    """

    def __init__(
        self, server: viser.ViserServer, session: Session, pace: Pace, *, follow: bool, restart: bool
    ):
        gui, self._session, self._pace = server.gui, session, pace
        self.commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._history: deque[tuple[float, float, float]] = deque(maxlen=KEPT)
        self._status, step = gui.add_html(""), gui.add_html("", visible=False)
        self._pause = gui.add_button("Pause")
        self._pause.on_click(lambda _: self.ask(self._toggle))
        actions = {"step": self._single, "reset": self.reset}
        gui.add_button_group(
            "episode",
            tuple(actions),
            hint="one control step, then pause; or a new episode, with the next seed",
        ).on_click(lambda event: self.ask(actions[event.target.value]))
        self._speed = gui.add_slider(
            "speed", 0.05, 2.0, 0.05, pace.speed, hint="× real time, where planning keeps up"
        )
        self._speed.on_update(lambda _: self.ask(self._set_speed))
        self._planning = gui.add_checkbox("planner on", True, hint="off: the robot gets the safe action")
        self._planning.on_update(lambda _: self.ask(self._set_planning))
        self._follow = gui.add_checkbox("follow the robot", follow)
        self._candidates = gui.add_checkbox("candidates", True, hint="draw some of the last iteration's")
        self._restart = gui.add_checkbox("restart by itself", restart, hint="a second after an episode ends")
        with gui.add_folder("Push"):
            self._add_push(gui)
            push = gui.add_html("", visible=False)
        with gui.add_folder("Planner, from the next plan on"):
            self._fields = {name: self._add_field(gui, name, v) for name, v in session.parameters().items()}
            planner = gui.add_html("", visible=False)
        self._errors = {"step": step, "push": push, "planner": planner}
        with gui.add_folder("Plots"):
            self._time = self._add_plot(gui, "plan, ms (grey: real time)", "#1a9e6b", limit=True)
            self._cost = self._add_plot(gui, "plan cost", "#3465a4")
        for ticked in (self._follow, self._candidates):
            ticked.on_update(lambda _: self.ask(lambda: None))  # drawn again

    def _add_push(self, gui: viser.GuiApi) -> None:
        strong = _one_digit(self._session.weight)
        self._force = gui.add_number(
            "force, N",
            strong,
            min=0.0,
            step=_one_digit(strong / 20),
            hint="at first about the robot's weight",
        )
        self._steps = gui.add_number("control steps", 4, min=1, max=LONGEST_PUSH, step=1)
        name = self._session.world.model.body(self._session.tracked).name or "robot"
        buttons = gui.add_button_group("direction", tuple(DIRECTIONS), hint=f"pushes the {name} now")

        @buttons.on_click
        def _(event: viser.GuiEvent[viser.GuiButtonGroupHandle]) -> None:
            direction = np.array(DIRECTIONS[event.target.value], dtype=float)
            self.ask(lambda: self._push(direction))

    def _add_field(self, gui: viser.GuiApi, name: str, value: float) -> Any:
        size = math.floor(math.log10(abs(value))) if value else 0
        field = gui.add_number(
            name.replace("_", " "), value, step=1 if isinstance(value, int) else 10.0 ** (size - 1)
        )
        field.on_update(lambda _: self.ask(self._change))
        return field

    def _add_plot(
        self, gui: viser.GuiApi, title: str, stroke: str, limit: bool = False
    ) -> viser.GuiUplotHandle:
        series = [uplot.Series(), uplot.Series(stroke=stroke, width=2)]
        if limit:
            series.append(uplot.Series(stroke="#999999", width=1))
        return gui.add_uplot(
            (np.zeros(0),) * len(series),
            tuple(series),
            title=title,
            height=150,
            legend=uplot.Legend(show=False),
            scales={"x": uplot.Scale(time=False), "y": uplot.Scale(auto=True)},
        )

    @property
    def follow(self) -> bool:
        return self._follow.value

    @property
    def candidates(self) -> bool:
        return self._candidates.value

    @property
    def restart(self) -> bool:
        return self._restart.value

    def ask(self, command: Callable[[], None]) -> None:
        self.commands.put(command)

    def _toggle(self) -> None:
        self._session.paused = not self._session.paused
        self._pace.restart()

    def _single(self) -> None:
        self._session.paused = True
        if self._session.ended is None:
            self.step()

    def reset(self) -> None:
        self._session.reset()
        self._history.clear()
        self._pace.restart()

    def _set_speed(self) -> None:
        self._pace.speed = self._speed.value

    def _set_planning(self) -> None:
        self._session.plan_or_not(self._planning.value)

    def _push(self, direction: np.ndarray) -> None:
        force = self._force.value * direction
        self._try("push", lambda: self._session.push(force, int(self._steps.value)))

    def _change(self) -> None:
        """All fields at once: some are valid only together."""
        self._try("planner", lambda: self._session.change(**{n: f.value for n, f in self._fields.items()}))

    def _try(self, what: str, act: Callable[[], None]) -> bool:
        """Whether it went well; else the error is shown, until it does."""
        error = self._errors[what]
        try:
            act()
        except MbrlError as refused:
            error.content = f'<div style="{TROUBLE}">{escape(str(refused))}</div>'
            error.visible = True
            return False
        error.visible = False
        return True

    def step(self) -> None:
        """A step of the session; pauses where it fails."""
        session = self._session
        self._pace.stepped()
        if not self._try("step", session.step):
            session.paused = True
            return
        row = session.row
        if row.get("plan_ms") is not None:
            cost = row["plan_cost"]
            self._history.append((row["time"], row["plan_ms"], math.nan if cost is None else cost))

    def show(self) -> None:
        """The numbers as they are now."""
        session, row = self._session, self._session.row
        self._pause.label = "Go on" if session.paused else "Pause"
        factor = self._pace.factor
        how = "" if session.planning else "safe action, "
        if session.ended is not None:
            how = f"over: {session.ended}"
        elif session.paused:
            how = "paused"
        elif math.isfinite(factor):
            how += f"{factor:.2f} × real time"
        numbers = {
            "return": session.total,
            "plan cost": row.get("plan_cost"),
            "plan, ms": row.get("plan_ms"),
            "eff. samples": row.get("planner/effective_samples"),
            "prediction error": row.get("output_error"),
            "fallbacks": session.policy.fallbacks,
        }
        cells = [
            f'<td>{name}</td><td style="text-align:right;padding-right:.8em">{_number(value)}</td>'
            for name, value in numbers.items()
        ]
        lines = "".join(f"<tr>{a}{b}</tr>" for a, b in zip(cells[::2], cells[1::2], strict=True))
        self._status.content = (
            f'<div style="padding:0 1em .3em;font-size:.85em"><b>{escape(session.world.name)}</b> with '
            f"{type(session.policy.planner).__name__}, seed {session.seed}<br>"
            f"{session.steps * session.dt:.2f} s (step {session.steps}), {escape(how)}"
            f"{'' if session.shows_plans else NO_PLANS}"
            f'<table style="width:100%;white-space:nowrap;font-size:.93em">{lines}</table></div>'
        )
        if self._history:
            t, ms, cost = np.array(self._history).T
            self._time.data = (t, ms, np.full_like(t, session.budget_ms))
            self._cost.data = (t, cost)


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _one_digit(value: float) -> float:
    return float(f"{value:.1g}")
