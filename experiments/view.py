"""Watch MPC live in a browser on this machine, push the robot, and turn the planner's knobs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from mbrl.errors import ContractError, MissingExtra
from mbrl.experiments.control import Control, P
from mbrl.experiments.interrupts import stop_on_interrupt


@dataclass(frozen=True, kw_only=True)
class Config(Control[P]):
    """Watch a robot under MPC live in a browser; push it and change the planner while it runs. Ctrl-C ends it.

    Choose a planner with --planner NAME, as for `mbrl mpc`, and its parameters with --planner.NAME, in any order.

    Attributes:
        host: address to listen on. Any but a loopback address lets everyone on the network watch and steer.
        port: to listen on; the next free one, if it is taken.
        speed: simulated seconds per second, 1 for real time, where planning keeps up.
        paused: wait until someone presses a button.
        restart: begin a new episode a second after one has ended.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    speed: float = 1.0
    paused: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        Control.__post_init__(self)
        if not 0.05 <= self.speed <= 2:
            raise ContractError(f"A view needs a speed from 0.05 to 2, but got {self.speed}.")
        if not 1 <= self.port <= 64000:
            raise ContractError(f"A view needs a port from 1 to 64000, but got {self.port}.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(config: Config[Any], console: Console | None = None) -> None:
    """Show until Ctrl-C or SIGTERM.

    Raises:
        MissingExtra: viser is not installed.
        MbrlError: the address cannot be listened on, or the planner cannot be used.
    """
    console = console or Console()
    try:
        import viser  # noqa: F401
    except ImportError:
        raise MissingExtra("mbrl view", "viser", "view") from None
    from mbrl.experiments.viewer import Viewer

    with stop_on_interrupt() as stop, Viewer(config) as viewer:
        if not is_loopback(config.host):
            console.print(
                f"[yellow]warning:[/yellow] {escape(config.host)} is no loopback address: whoever reaches it can watch "
                "and steer, without a password.",
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"{viewer.url} shows {config.env}. Ctrl-C ends it.", highlight=False, soft_wrap=True)
        while not stop.is_set():
            viewer.turn()
