"""A session in a browser: the loop that steps it at its pace, and draws it."""

from __future__ import annotations

import contextlib
import io
import queue
import re
import socket
import time
from functools import partial
from typing import Any, Self
from unittest import mock

import numpy as np
import viser
import websockets.asyncio.server

from mbrl.errors import MbrlError
from mbrl.experiments.recording import walks
from mbrl.experiments.session import Pace, Session
from mbrl.experiments.view import Config, is_loopback
from mbrl.experiments.view_panel import Panel
from mbrl.experiments.view_scene import Scene

DRAWN, TRACED = 1 / 30, 0.1  # s between pictures, and between drawn plans, at least
NONE = np.zeros((0, 1, 3))
WAIT = 0.05  # s for which Ctrl-C may have to wait
LOCAL = re.compile(r"http://(127(\.\d+){3}|localhost|\[::1\])(:\d+)?")
"""Origins of pages of this machine; of another one, if its port is forwarded."""
PAUSE = 1.0  # s after an episode, before the next one


class Server(viser.ViserServer):
    """viser's server, but without its tunnel, which would open the page to the whole internet for whoever sees it.

    At a loopback address it serves pages of this machine only: else any page on the web could let the browser of its
    reader connect. viser hands no origins on to websockets, so they are added while it starts.
    """

    def __init__(self, host: str, port: int):
        origins = [None, LOCAL] if is_loopback(host) else None
        serve = websockets.asyncio.server.serve
        with mock.patch.object(websockets.asyncio.server, "serve", partial(serve, origins=origins)):
            super().__init__(host=host, port=port, label="mbrl view", verbose=False)

    def request_share_url(self, verbose: bool = True) -> None:
        return None


class Viewer:
    """A session, the server that shows it, and one `turn` of the loop after another.

    Attributes:
        url: of the page.

    Raises:
        MbrlError: the address cannot be listened on.
    """

    def __init__(self, config: Config[Any]):
        self.session = Session(config)
        self.pace = Pace(self.session.dt, config.speed)
        self.session.paused = config.paused
        check_address(config.host)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its address without being asked
            self.server = Server(config.host, config.port)
        self.server.gui.configure_theme(show_logo=False, show_share_button=False)
        self.scene = Scene(self.server, self.session.world, self.session.tracked)
        self.panel = Panel(
            self.server,
            self.session,
            self.pace,
            follow=walks(self.session.world.model),
            restart=config.restart,
        )
        self.server.on_client_connect(lambda _: self.panel.ask(lambda: None))  # draws what it has missed
        host = config.host if ":" not in config.host else f"[{config.host}]"
        self.url = f"http://{host}:{self.server.get_port()}"
        self._changed, self._drawn, self._traced = True, 0.0, 0.0
        self._ended: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.server.stop()

    def turn(self) -> None:
        """What is due: commands, a step, a picture; else wait, but not for long."""
        session, pace = self.session, self.pace
        runs = not session.paused and session.ended is None
        wait = min(pace.wait(), WAIT) if runs else WAIT
        with contextlib.suppress(queue.Empty):
            self.panel.commands.get(timeout=max(wait, 1e-6))()
            self._changed = True
            while True:  # the rest of what was asked for during a slow step
                self.panel.commands.get_nowait()()
        if not session.paused and session.ended is None and not pace.wait():
            self.panel.step()
            self._changed = True
        self._restart()
        now = time.perf_counter()
        if self._changed and now - self._drawn >= DRAWN:
            self._draw(now)

    def _restart(self) -> None:
        now = time.perf_counter()
        if self.session.ended is None:
            self._ended = None
        elif self._ended is None:
            self._ended = now
        elif self.panel.restart and now - self._ended >= PAUSE:
            self.panel.reset()
            self._changed = True

    def _draw(self, now: float) -> None:
        session = self.session
        with self.server.atomic():
            self.scene.show(session.state.numpy(), follow=self.panel.follow, push=session.pushed)
            self.panel.show()
            self._changed, self._drawn = False, now
            still = session.paused or session.ended is not None
            if still or now - self._traced >= TRACED:
                watched = bool(self.server.get_clients())
                self.scene.show_plans(session.traces(sampled=self.panel.candidates) if watched else NONE)
                self._traced = now
        self.server.flush()


def check_address(host: str) -> None:
    """Refuse an address that is none of this machine's, at which viser would wait for ever.

    Raises:
        MbrlError: with the reason.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError as error:
        raise MbrlError(
            f"A view needs an address of this machine to listen on, but {host} is none ({error.strerror or error}). "
            "Leave --host out."
        ) from None
