"""Video, replay geometry and report."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from rich.console import Console

from mbrl import MPC, Box, FullState, Problem
from mbrl.envs import make_world
from mbrl.errors import MissingExtra, RunFolderError
from mbrl.experiments import charts, motion_plots, mpc, replay, report, video
from mbrl.experiments.recording import Recording, tracked_body, walks
from mbrl.planners import CEM, PredictiveSampling
from tests.problems import DoubleIntegrator

STEPS, HORIZON = 4, 6


def record(name: str) -> Recording:
    world = make_world(name)
    problem = world.problem(HORIZON, threads=1)
    planner = PredictiveSampling(population=20)
    policy = MPC(problem, planner, estimator=FullState(), generator=torch.Generator().manual_seed(0))
    env = world.make()
    obs, info = env.reset(seed=0)
    recording = Recording(world, problem, [torch.as_tensor(info["state"])], [], [], [])
    total = 0.0
    for step in range(STEPS):
        action = policy(obs, info)[0]
        obs, reward, _, _, info = env.step(action.numpy().astype(np.float32))
        total += float(reward)
        row = {
            "step": step,
            "time": (step + 1) * problem.dynamics.dt,
            "reward": float(reward),
            "return": total,
        }
        assert policy.report is not None
        row |= mpc.measure(policy.report, float(reward), problem.dynamics.dt)
        recording.add(
            torch.as_tensor(info["state"]),
            action,
            policy.report.plan,
            row | {"terminated": 0, "truncated": 0, "diverged": 0},
        )
    env.close()
    return recording


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record("Reacher-v5")


@pytest.mark.parametrize(
    ("name", "body", "moves"),
    [("HalfCheetah-v5", "torso", True), ("Ant-v5", "torso", True), ("Reacher-v5", "fingertip", False),
     ("InvertedPendulum-v5", "pole", False), ("Pusher-v5", "tips_arm", False)],
)  # fmt: skip
def test_the_body_that_tells_most(name: str, body: str, moves: bool) -> None:
    model = make_world(name).model
    assert model.body(tracked_body(model)).name == body
    assert walks(model) == moves


def test_traces_start_at_the_robot_and_follow_the_plan(recording: Recording) -> None:
    body = tracked_body(recording.world.model)
    paths = recording.traces(2, body)
    assert paths.shape == (1 + 7, HORIZON + 1, 3)  # every third of 20 candidates
    data = mujoco.MjData(recording.world.model)
    mujoco.mj_setState(recording.world.model, data, recording.states[2].numpy()[: -recording.problem.dynamics.ny],
                       mujoco.mjtState.mjSTATE_INTEGRATION)  # fmt: skip
    mujoco.mj_kinematics(recording.world.model, data)
    np.testing.assert_allclose(paths[:, 0], np.broadcast_to(data.xipos[body], (8, 3)), atol=1e-12)
    # The plan is followed in the very simulator it was made in, so its next point comes true.
    np.testing.assert_allclose(recording.traces(3, body)[0, 0], paths[0, 1], atol=1e-12)


def test_scene_holds_what_mujoco_computes(recording: Recording) -> None:
    scene = replay.scene(recording)
    poses = np.frombuffer(base64.b64decode(scene["poses"]), "<f4").reshape(scene["frames"], -1, 7)
    assert poses.shape[1] == len(scene["geoms"])
    assert all(geom["type"] in replay._TYPES.values() for geom in scene["geoms"])
    np.testing.assert_allclose(np.linalg.norm(poses[..., 3:], axis=-1), 1, atol=1e-6)
    assert scene["returns"][-1] == pytest.approx(recording.rows[-1]["return"], abs=1e-3)


@pytest.mark.parametrize("geom", ['<geom type="plane" size="1 1 1"/>', ""])
def test_the_camera_copes_with_nothing_to_see(geom: str) -> None:
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><worldbody>{geom}<body><joint/><geom size="0.1" rgba="0 0 0 0"/></body></worldbody></mujoco>'
    )
    visible = [g for g in range(model.ngeom) if replay.shape(model, g) is not None]
    view = replay.view(model, np.zeros((len(visible), 7)), visible, np.zeros(3))
    assert np.isfinite([*view["target"], *view["offset"], view["distance"]]).all() and view["distance"] > 0


def test_hull_of_a_mesh_encloses_it_and_points_outward() -> None:
    box = "-1 -1 -1  1 -1 -1  1 1 -1  -1 1 -1  -1 -1 1  1 -1 1  1 1 1  -1 1 1"
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><asset><mesh name="m" vertex="{box}"/></asset>'
        '<worldbody><geom type="mesh" mesh="m" rgba="1 0 0 1"/></worldbody></mujoco>'
    )
    geom = replay.shape(model, 0)
    assert geom is not None
    points, faces = np.array(geom["vertices"]), np.array(geom["faces"])
    a, b, c = points[faces].swapaxes(0, 1)
    normals = np.cross(b - a, c - a)
    assert ((normals * a).sum(-1) > 0).all()
    assert np.linalg.norm(normals, axis=-1).sum() / 2 == pytest.approx(24)  # the whole surface


def test_report_stands_alone(recording: Recording, tmp_path: Path) -> None:
    config = mpc.Config(planner=CEM(), env="Reacher-v5")
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"not really a video")
    text = report.write_report(recording, config, tmp_path / "report.html", video=clip).read_text(
        encoding="utf-8"
    )
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in text
    assert "data:video/mp4;base64," in text
    assert "Every predicted state came true to the last bit" in text
    assert not re.search(r"\$[a-z]+\b", text.split("<script>")[0])  # no placeholder left
    assert text.count("<svg") >= 8


@pytest.mark.parametrize("gap", range(STEPS))
def test_a_step_without_prediction_hides_no_error(recording: Recording, gap: int) -> None:
    rows: list[Any] = [
        dict(row, state_error=0.25, output_error=0.25, reward_error=0.5) for row in recording.rows
    ]
    for name in ("state_error", "output_error", "reward_error", "predicted_reward"):
        rows[gap][name] = math.nan
    known = dataclasses.replace(recording, rows=rows)
    facts = report.measure(known)
    assert (facts["state_error"], facts["output_error"], facts["reward_error"]) == (0.25, 0.25, 0.5)
    assert facts["unpredicted"] == 1
    text = " ".join(report.words(facts, mpc.Config(planner=CEM())))
    assert "In 1 of 4 steps there was no prediction to compare" in text and "nan" not in text


def test_a_report_copes_with_a_diverged_last_step(recording: Recording, tmp_path: Path) -> None:
    rows: list[Any] = [dict(row) for row in recording.rows]
    rows[-1] |= {"reward": math.nan, "reward_error": math.nan, "diverged": 1, "truncated": 1}
    states = [*recording.states[:-1], recording.states[-1] * math.nan]
    lost = dataclasses.replace(recording, rows=rows, states=states)
    config = mpc.Config(planner=CEM(), env="Reacher-v5")
    text = report.write_report(lost, config, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "physics diverged in step 3" in text and ">nan" not in text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_a_full_disk_leaves_no_part_of_a_report(recording: Recording, tmp_path: Path) -> None:
    (tmp_path / "report.html.part").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match="report.html cannot be written: No space left on device"):
        report.write_report(recording, mpc.Config(planner=CEM(), env="Reacher-v5"), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_charts_survive_odd_numbers() -> None:
    assert charts.line_chart([1.0], {"a": [None]}, label="a") == ""
    assert charts.histogram([], label="a") == ""
    assert charts.phase_chart([math.nan], [1.0], xlabel="q", label="v") == ""
    assert charts.phase_chart([1.0, 1.0], [0.0, math.inf], xlabel="q", label="v").count("<circle") == 2
    for values in ([0.0, 0.0], [math.nan, 2.0], [1e-300, 1e300], [-5.0, -5.0], [None, math.inf]):
        chart = charts.line_chart([0.1, 0.2], {"a": values}, label="a <b>")
        assert "nan" not in chart and "inf" not in chart and "<b>" not in chart
    assert charts.line_chart([1.0, 2.0, 3.0], {"a": [1.0, None, 3.0]}, label="a").count("L") == 1
    assert 'class="limit"' in charts.histogram([3.0, 3.0, 9.0], label="ms", limit=5.0)


def test_controls_are_drawn_between_their_bounds() -> None:
    chart = charts.line_chart(
        [0.0, 1.0, 2.0], {"u": [0.0, 2.0, 2.0]}, label="u", limits=(-1.0, 3.0, math.inf), held=True
    )
    low, high = (float(y) for y in re.findall(r'class="limit"[^>]*y1="([\d.]+)"', chart))
    (path,) = re.findall(r'class="line s0" d="([^"]+)"', chart)
    found = re.fullmatch(r"M58.0 ([\d.]+)h0.1H282.0V([\d.]+)H506.0V([\d.]+)", path)  # holds, then jumps
    assert found is not None
    zero, two, end = map(float, found.groups())
    assert (low - zero) / (low - high) == pytest.approx(0.25, abs=0.01)
    assert (low - two) / (low - high) == pytest.approx(0.75, abs=0.01) and two == end


def test_what_was_sent_and_where_it_led_is_drawn(recording: Recording) -> None:
    text = motion_plots.controls(recording)
    assert text.count("<path") == 2 and "joint0" in text and "the bounds, -1 and 1" in text
    text = motion_plots.portraits(recording)  # not of the target, which stands still
    assert sorted(re.findall(r"Phase portrait: ([a-z0-9]+)<", text)) == ["joint0", "joint1"]
    joints = recording.joints()
    model = recording.world.model
    assert list(joints) == [model.joint(i).name for i in range(model.njnt)]
    data = mujoco.MjData(model)
    for t, state in enumerate(recording.states):
        row = state.numpy()[: -recording.problem.dynamics.ny]
        mujoco.mj_setState(model, data, row, mujoco.mjtState.mjSTATE_INTEGRATION)
        for i, (_, positions, velocities) in enumerate(joints.values()):
            assert (positions[t], velocities[t]) == (data.qpos[i], data.qvel[i])
    turn = model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE
    assert [turns for turns, _, _ in joints.values()] == turn.tolist()


@dataclasses.dataclass(frozen=True)
class ManyControls(DoubleIntegrator):
    nu: int = 8


def test_of_many_controls_those_that_vary_most_are_drawn(recording: Recording) -> None:
    """Eight controls of two bounds, of which the first two stand still."""
    low, high = torch.full((8,), -1.0), torch.tensor([1.0] * 5 + [2.0] * 3)
    problem: Problem[Any, Any, Any] = Problem(ManyControls(), recording.problem.cost, Box(low, high), HORIZON)
    wave = torch.arange(8.0).clamp(min=1) - 1
    actions = [0.01 * k * wave for k in range(STEPS)]
    text = motion_plots.controls(dataclasses.replace(recording, problem=problem, actions=actions))
    assert re.findall(r"control (\d)<", text) == [str(i) for i in range(2, 8)]
    assert text.count("The 6 of 8 that vary most.") == text.count("<svg") == 2
    assert text.index("the bounds, -1 and 1") < text.index("the bounds, -1 and 2")


def test_cost_per_iteration_is_of_distinct_plans(recording: Recording) -> None:
    assert motion_plots.convergence(recording) == ""  # a sampling planner does not tell
    infos = [{"costs": torch.tensor([[9.0, n, 1.0][: n + 1]])} for n in (2, 1, 1, 1)]
    plans = [dataclasses.replace(recording.plans[0], info=info) for info in infos]
    plans[2] = dataclasses.replace(plans[1])  # followed for another step
    text = motion_plots.convergence(dataclasses.replace(recording, plans=plans))
    dt = recording.problem.dynamics.dt
    assert re.findall(r"from ([\d.]+) s<", text) == [f"{k * dt:.3g}" for k in (0, 1, 3)]
    assert [path.count("L") for path in re.findall(r' d="([^"]+)"', text)] == [2, 1, 1]
    assert 'class="cursor"' not in text  # iterations are no time


@pytest.fixture
def console() -> Any:
    return Console(record=True, width=400)


def test_no_graphics_costs_only_the_video(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    def fail(*_: object) -> None:
        raise mujoco.FatalError("an OpenGL platform library has not been loaded")

    monkeypatch.setattr(mujoco, "Renderer", fail)
    assert mpc.save_video(recording, tmp_path / "v.mp4", console) is None
    shown = console.export_text()
    assert "libegl1 libegl-mesa0 libgl1-mesa-dri" in shown and "MUJOCO_GL" in shown
    assert not (tmp_path / "v.mp4").exists()


def test_no_encoder_costs_only_the_video(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtra, match=r"mbrl-kit\[video\]"):
        video.write_video(recording, tmp_path / "v.mp4")
    assert mpc.save_video(recording, tmp_path / "v.mp4", console) is None


def test_video_shows_the_robot_and_the_plan(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        picture = next(video.pictures(recording, [2]))
    except video.NoGraphics as error:  # a machine without graphics still says what to install
        assert "libegl1" in str(error)
        return
    assert picture.shape == (video.HEIGHT, video.WIDTH, 3)
    assert picture.std() > 5  # not a blank frame
    monkeypatch.setattr(video, "add_path", lambda *_: None)
    assert (picture != next(video.pictures(recording, [2]))).any(-1).sum() > 50
    assert video.write_video(recording, tmp_path / "v.mp4").stat().st_size > 1000
