"""The view in a browser: where it listens, what it draws, and what its controls do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import mujoco
import numpy as np
import pytest
import viser
import zstandard
from rich.console import Console
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin, Subprotocol

from mbrl.errors import MbrlError
from mbrl.experiments import cli, view, viewer
from mbrl.experiments.view_scene import mesh_of
from mbrl.experiments.viewer import Server, Viewer, check_address

OPTIONS = ["--env", "cart-pole", "--planner", "cem", "--planner.population", "8", "--planner.elites", "3"]
COMMAND = ["view", *OPTIONS, "--horizon", "6", "--threads", "1", "--speed", "2", "--port", "18080"]


@pytest.fixture
def running() -> Iterator[Viewer]:
    with Viewer(cli.parse([*COMMAND, "--paused"])) as running:
        yield running


class Browser:
    """What a browser does: it says where its camera is, keeps what it is told, and sends what is clicked."""

    def __init__(self, url: str, origin: str | None = None):
        version = Subprotocol(f"viser-v{viser.__version__}")
        self.socket: ClientConnection = connect(
            url.replace("http", "ws"),
            subprotocols=[version],
            max_size=None,
            proxy=None,
            origin=None if origin is None else Origin(origin),
        )
        self.messages: list[dict[str, Any]] = []
        camera = {"wxyz": (1.0, 0, 0, 0), "position": (3.0, 0, 0), "look_at": (0.0, 0, 0)}
        lens = {"fov": 1.0, "near": 0.1, "far": 100.0, "image_height": 600, "image_width": 800}
        self.send("ViewerCameraMessage", **camera, **lens, up_direction=(0.0, 0, 1.0))

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(msgspec.msgpack.encode({"type": kind, **fields}))

    def listen(self, seconds: float = 0.3) -> list[dict[str, Any]]:
        """What has come since the last time."""
        new, until = [], time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                raw = self.socket.recv(timeout=left)
            except TimeoutError:
                break
            assert isinstance(raw, bytes)
            size = int.from_bytes(raw[8:16], "little")
            window = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(raw[16 : 16 + size]))
            new += window["messages"]
        self.messages += new
        return new

    def control(self, label: str) -> str:
        """The name of a control by its label."""
        found = [m["uuid"] for m in self.messages if m.get("props", {}).get("label") == label]
        assert len(found) == 1, label
        return str(found[0])

    def use(self, label: str, value: Any) -> None:
        self.send("GuiUpdateMessage", uuid=self.control(label), updates={"value": value})


def turn(running: Viewer, until: Any, turns: int = 60) -> None:
    """Turns of the loop until something is so."""
    for _ in range(turns):
        running.turn()
        if until():
            return
    raise AssertionError("it never came to be")


def listening(port: int) -> list[str]:
    """Addresses, as the kernel writes them, at which anything listens on the port."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.split(":")[1], 16) == port:
                found.append(address.split(":")[0])
    return found


def test_it_listens_on_this_machine_only_and_serves_a_page(running: Viewer) -> None:
    assert listening(running.server.get_port()) == ["0100007F"]  # 127.0.0.1
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(running.url, timeout=10) as answer:
        page = answer.read().decode()
    assert answer.status == 200 and "<html" in page
    assert not re.search(r"""(?:src|href)=["']https?:""", page)


def test_two_browsers_see_the_robot_move_and_its_plans(running: Viewer) -> None:
    browsers = [Browser(running.url), Browser(running.url)]
    turn(running, lambda: len(running.server.get_clients()) == 2)
    for browser in browsers:
        browser.listen()
        names = {m.get("name") for m in browser.messages}
        assert {"/world/plan", "/world/candidates", "/world/1 cart", "/world/2 pole"} <= names
    running.session.paused = False
    turn(running, lambda: running.session.steps >= 5)
    running.session.paused = True
    turn(running, lambda: not running._changed)
    for browser in browsers:
        told = browser.listen()
        moved = [
            m["position"] for m in told if m["type"] == "SetPositionMessage" and m["name"] == "/world/1 cart"
        ]
        drawn = {
            m["name"] for m in told if m["type"] == "SceneNodeUpdateMessage" and "points" in m["updates"]
        }
        assert moved[-1][0] == pytest.approx(float(running.session.state[1]))
        assert {"/world/plan", "/world/candidates"} <= drawn
        browser.socket.close()
    running.session.paused = False
    steps = running.session.steps
    turn(running, lambda: running.session.steps > steps + 2 and not running.server.get_clients())


def test_pause_step_and_reset(running: Viewer) -> None:
    browser, session = Browser(running.url), running.session
    turn(running, lambda: len(running.server.get_clients()) == 1)
    browser.listen()
    for _ in range(3):
        running.turn()
    assert session.paused and session.steps == 0
    browser.use("episode", "step")
    turn(running, lambda: session.steps == 1)
    for _ in range(3):
        running.turn()
    assert session.steps == 1
    (button,) = {m["props"]["label"] for m in browser.messages if m["type"] == "GuiButtonMessage"}
    browser.use(button, True)
    turn(running, lambda: session.steps >= 3)
    browser.use("episode", "reset")
    turn(running, lambda: session.seed == 1)
    assert session.steps <= 1
    browser.use("speed", 0.25)
    turn(running, lambda: running.pace.speed == 0.25)
    browser.use("planner on", False)
    turn(running, lambda: not session.planning)


def test_parameters_are_turned_and_what_is_wrong_is_told(running: Viewer) -> None:
    browser, session = Browser(running.url), running.session
    turn(running, lambda: len(running.server.get_clients()) == 1)
    browser.listen()
    error = running.panel._errors["planner"]
    browser.use("elites", 9)
    turn(running, lambda: error.visible)
    assert "CEM needs" in error.content and session.parameters()["elites"] == 3
    browser.use("population", 20)  # valid together
    turn(running, lambda: session.parameters()["population"] == 20)
    assert not error.visible and session.parameters()["elites"] == 9
    browser.use("horizon", 9)
    turn(running, lambda: session.parameters()["horizon"] == 9)


def test_a_push_is_drawn_while_it_lasts(running: Viewer) -> None:
    browser, session = Browser(running.url), running.session
    turn(running, lambda: len(running.server.get_clients()) == 1)
    browser.listen()
    browser.use("force, N", 7.0)
    browser.use("control steps", 2)
    time.sleep(0.2)
    browser.use("direction", "−x")
    turn(running, lambda: session.pushed is not None)
    assert session.pushed is not None and session.pushed.tolist() == [-7.0, 0.0, 0.0]
    turn(running, lambda: running.scene._push.visible)
    session.paused = False
    turn(running, lambda: not running.scene._push.visible and session.steps > 2)


def test_an_episode_that_ends_is_told_and_starts_again_on_demand_or_by_itself(
    running: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser, session = Browser(running.url), running.session
    turn(running, lambda: len(running.server.get_clients()) == 1)
    browser.listen()

    def end() -> None:
        session.paused, session.ended = False, "time limit"

    running.panel.ask(end)
    turn(running, lambda: "over: time limit" in running.panel._status.content)
    assert session.steps == 0 and session.seed == 0
    monkeypatch.setattr(viewer, "PAUSE", 0.1)
    browser.use("restart by itself", True)
    turn(running, lambda: session.seed == 1 and session.steps > 0)


def test_plans_that_cannot_be_drawn_are_said_to_be_so(
    running: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.panel.show()
    assert "plans are not drawn" not in running.panel._status.content
    monkeypatch.setattr("mbrl.experiments.session.shows_plans", lambda *_: False)
    running.panel.show()
    assert "plans are not drawn" in running.panel._status.content


def test_commands_of_the_page_are_commands() -> None:
    page = (Path(__file__).parents[1] / "docs" / "view.md").read_text(encoding="utf-8")
    commands = re.findall(r"^mbrl (view .*)$", page, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert isinstance(cli.parse(command.split()), view.Config)


def test_a_planner_that_fails_pauses_the_episode(running: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MbrlError("no plan today")

    with monkeypatch.context() as patch:
        patch.setattr(running.session.policy, "_search", fail)
        running.session.paused = False
        turn(running, lambda: running.session.paused)
        assert "no plan today" in running.panel._errors["step"].content
    running.session.paused = False
    turn(running, lambda: running.session.steps > 0)
    assert not running.panel._errors["step"].visible


def test_no_browser_can_open_the_page_to_the_internet(
    running: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    refuse = Server.request_share_url

    def request(self: Server, verbose: bool = True) -> None:
        refuse(self, verbose)
        asked.append("share")

    monkeypatch.setattr(Server, "request_share_url", request)
    browser = Browser(running.url)
    browser.send("ShareUrlRequest")
    turn(running, lambda: bool(asked))
    assert running.server._share_tunnel is None


def test_pages_from_elsewhere_are_refused(running: Viewer) -> None:
    port = running.server.get_port()
    for page in (running.url, f"http://localhost:{port}", "http://localhost:9000"):
        Browser(running.url, page).socket.close()
    for page in ("http://evil.example", "http://127.0.0.1.evil.example", f"http://evil.example:{port}"):
        with pytest.raises(InvalidStatus, match="403"):
            Browser(running.url, page)


def test_the_camera_of_a_walking_robot_follows() -> None:
    options = ["--env", "HalfCheetah-v5", "--planner", "random-shooting", "--planner.population", "2"]
    with Viewer(cli.parse(["view", *options, "--horizon", "2", "--threads", "1", "--paused"])) as running:
        state = running.session.state.clone()
        state[1] = 7.3  # the root's x
        running.scene.show(state.numpy(), follow=True, push=None)
        scene = running.server.scene
        world, torso = (scene.get_handle_by_name(name) for name in ("/world", "/world/1 torso"))
        floor = scene.get_handle_by_name("/world/floor")
        assert world is not None and torso is not None and floor is not None
        assert world.position[0] == pytest.approx(-7.3) and torso.position[0] == pytest.approx(7.3)
        assert floor.position[0] == 7.0
        running.scene.show(state.numpy(), follow=False, push=None)
        assert world.position[0] == 0


def test_meshes_are_where_mujoco_has_its_geoms() -> None:
    model = mujoco.MjModel.from_xml_string("""
    <mujoco>
      <asset><mesh name="wedge" vertex="0 0 0  1 0 0  0 0.5 0  0 0 0.25"/></asset>
      <worldbody>
        <geom type="plane" size="1 1 1"/>
        <geom type="sphere" size="0.1" pos="1 2 3"/>
        <geom type="capsule" size="0.1 0.3" pos="1 0 0"/>
        <geom type="ellipsoid" size="0.1 0.2 0.3" pos="0 1 0"/>
        <geom type="cylinder" size="0.1 0.3" pos="0 0 1"/>
        <geom type="box" size="0.1 0.2 0.3" pos="1 1 0" euler="0 0 90"/>
        <geom type="mesh" mesh="wedge" pos="0.1 0.2 0.3"/>
      </worldbody>
    </mujoco>
    """)
    wanted = [
        None,
        ([0.9, 1.9, 2.9], [1.1, 2.1, 3.1]),
        ([0.9, -0.1, -0.4], [1.1, 0.1, 0.4]),
        ([-0.1, 0.8, -0.3], [0.1, 1.2, 0.3]),
        ([-0.1, -0.1, 0.7], [0.1, 0.1, 1.3]),
        ([0.8, 0.9, -0.3], [1.2, 1.1, 0.3]),
        ([0.1, 0.2, 0.3], [1.1, 0.7, 0.55]),
    ]
    for g, bounds in enumerate(wanted):
        mesh = mesh_of(model, g)
        if bounds is None:
            assert mesh is None
        else:
            assert mesh is not None and np.allclose(mesh.bounds, bounds, atol=2e-3)


def test_an_address_of_another_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    check_address("127.0.0.1")
    assert cli.main([*COMMAND, "--host", "192.0.2.1"]) == 1  # reserved for documentation
    assert "192.0.2.1 is none" in " ".join(capsys.readouterr().err.split())


def test_a_taken_port_leads_to_the_next_one(running: Viewer) -> None:
    with Viewer(cli.parse([*COMMAND, "--paused"])) as second:
        assert second.server.get_port() > running.server.get_port()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.7", False),
        ("robot", False),
    ],
)
def test_who_else_can_watch_is_told(
    host: str, loopback: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Nothing:
        url = "http://nowhere"

        def __init__(self, config: view.Config[Any]):
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def turn(self) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(viewer, "Viewer", Nothing)
    config = cli.parse([*COMMAND, "--host", host])
    view.main(config, Console())
    assert ("without a password" in " ".join(capsys.readouterr().out.split())) == (not loopback)


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "viser", None)
    assert cli.main(COMMAND) == 1
    assert 'pip install "mbrl-kit[view]"' in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_ends_it_cleanly() -> None:
    command = [sys.executable, "-m", "mbrl", *COMMAND]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        address = re.match(r"http://127\.0\.0\.1:(\d+) shows cart-pole\.", process.stdout.readline())
        assert address is not None and listening(int(address[1])) == ["0100007F"]
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
