"""A video of a run: the robot, the plan it follows and a few plans it considered."""

from __future__ import annotations

import copy
import itertools
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np

from mbrl.envs import World, write_state
from mbrl.errors import MbrlError, MissingExtra
from mbrl.experiments.recording import Recording, robot_root, tracked_body, walks

WIDTH, HEIGHT = 720, 480  # multiples of 16, so that every player takes them
RATE = 30.0  # frames per second of simulated time, at most
PLAN, CANDIDATE = (0.10, 0.85, 0.55, 1.0), (0.95, 0.75, 0.25, 0.35)


class NoGraphics(MbrlError, RuntimeError):
    """This machine cannot render pictures."""

    def __init__(self, cause: object):
        super().__init__(
            f"MuJoCo cannot render pictures with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: {cause}. On a machine without a screen install the Debian packages "
            "libegl1 libegl-mesa0 libgl1-mesa-dri and set MUJOCO_GL=egl."
        )


def write_video(recording: Recording, path: Path) -> Path:
    """Render the recording into an MP4 file.

    Raises:
        NoGraphics: no usable OpenGL.
        MissingExtra: no encoder.
    """
    try:
        import imageio_ffmpeg
    except ImportError:
        raise MissingExtra("A video", "imageio-ffmpeg", "video") from None
    frames = recording.frames(RATE)
    stride = frames[1] - frames[0] if len(frames) > 1 else 1
    fps = 1 / (stride * recording.problem.dynamics.dt)
    stream = pictures(recording, frames)
    first = next(stream)  # graphics fail here, before there is a file
    writer = imageio_ffmpeg.write_frames(
        str(path), (WIDTH, HEIGHT), fps=fps, codec="libx264", quality=7, ffmpeg_log_level="error"
    )
    writer.send(None)
    try:
        for picture in itertools.chain([first], stream):
            writer.send(np.ascontiguousarray(picture))
    finally:
        writer.close()
    return path


def pictures(recording: Recording, frames: list[int]) -> Iterator[np.ndarray]:
    """Frames (HEIGHT, WIDTH, 3), uint8."""
    model = copy.copy(recording.world.model)
    model.vis.global_.offwidth, model.vis.global_.offheight = WIDTH, HEIGHT
    model.vis.quality.shadowsize = 1024  # twice as fast as the default in software rendering
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # glfw warns about what the exception says
            renderer = mujoco.Renderer(model, HEIGHT, WIDTH)
    except AttributeError as error:  # MuJoCo leaves names out that it could not import
        raise NoGraphics("its OpenGL library is missing or switched off") from error
    except Exception as error:  # each platform fails in its own way
        raise NoGraphics(str(error).split(",")[0] or type(error).__name__) from error
    with renderer:
        data, view, body = mujoco.MjData(model), camera(recording.world), tracked_body(model)
        width = 0.0022 * view.distance
        for frame in frames:
            write_state(model, data, recording.states[frame].nan_to_num())
            renderer.update_scene(data, view)
            paths = recording.traces(frame, body)
            for i in reversed(range(len(paths))):  # the plan last, on top
                add_path(renderer.scene, paths[i], *((1.6 * width, PLAN) if i == 0 else (width, CANDIDATE)))
            yield renderer.render()


def camera(world: World) -> mujoco.MjvCamera:
    """The world's camera; where it says nothing, one that follows a walking robot from the side."""
    model, wanted = world.model, dict(world.camera)
    view = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, view)
    view.elevation = -20.0 if walks(model) else -35.0
    if walks(model):
        wanted = {"trackbodyid": robot_root(model), **wanted}
    for name, value in wanted.items():
        setattr(view, name, value)
    if view.trackbodyid >= 0 and "type" not in wanted:
        view.type = mujoco.mjtCamera.mjCAMERA_TRACKING
    return view


def add_path(scene: mujoco.MjvScene, path: np.ndarray, width: float, rgba: tuple[float, ...]) -> None:
    """Draw a polyline (n, 3) into the scene; pieces that are not finite, or beyond its capacity, are left out."""
    for a, b in itertools.pairwise(path):
        if not math.isfinite(a.sum() + b.sum()) or scene.ngeom >= scene.maxgeom:
            continue
        geom = scene.geoms[scene.ngeom]
        kind = mujoco.mjtGeom.mjGEOM_CAPSULE
        mujoco.mjv_initGeom(geom, kind, np.zeros(3), np.zeros(3), np.zeros(9), np.array(rgba, np.float32))
        mujoco.mjv_connector(geom, kind, width, a, b)
        scene.ngeom += 1
