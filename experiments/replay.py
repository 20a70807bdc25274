"""The geometry of a recording as JSON, for the report's viewer: no OpenGL is needed anywhere."""

from __future__ import annotations

import base64
from typing import Any

import mujoco
import numpy as np
from scipy.spatial import ConvexHull, QhullError

from mbrl.envs import write_state
from mbrl.experiments.recording import Recording, body_positions, robot_root, tracked_body, walks

RATE = 30.0  # frames per second, at most
TRACE_POINTS = 16  # per planned trajectory
HULL_DIRECTIONS = 120  # more make meshes rounder and the report larger
_GREY = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # MuJoCo's default: a material shows through
_TYPES = {
    mujoco.mjtGeom.mjGEOM_PLANE: "plane",
    mujoco.mjtGeom.mjGEOM_SPHERE: "sphere",
    mujoco.mjtGeom.mjGEOM_CAPSULE: "capsule",
    mujoco.mjtGeom.mjGEOM_ELLIPSOID: "ellipsoid",
    mujoco.mjtGeom.mjGEOM_CYLINDER: "cylinder",
    mujoco.mjtGeom.mjGEOM_BOX: "box",
    mujoco.mjtGeom.mjGEOM_MESH: "mesh",
}


def scene(recording: Recording) -> dict[str, Any]:
    """Everything viewer.js draws: shapes, poses per frame, planned trajectories and a camera."""
    model = recording.world.model
    frames = recording.frames(RATE)
    visible = [g for g in range(model.ngeom) if model.geom_group[g] <= 2 and shape(model, g) is not None]
    data = mujoco.MjData(model)
    poses = np.zeros((len(frames), len(visible), 7), np.float32)
    for i, frame in enumerate(frames):
        write_state(model, data, recording.states[frame].nan_to_num())
        for j, g in enumerate(visible):
            poses[i, j, :3] = data.geom_xpos[g]
            quat = np.zeros(4)
            mujoco.mju_mat2Quat(quat, data.geom_xmat[g])
            poses[i, j, 3:] = quat

    states = np.stack([recording.states[frame].numpy() for frame in frames])
    body = tracked_body(model)
    paths = [recording.traces(frame, body) for frame in frames]
    n, points = (max(path.shape[axis] for path in paths) for axis in (0, 1))
    keep = np.unique(np.linspace(0, points - 1, TRACE_POINTS).round().astype(int))
    traces = np.full((len(paths), n, points, 3), np.nan, np.float32)
    for path, trace in zip(paths, traces, strict=True):  # where no plan is followed yet, there is none
        trace[: len(path), : path.shape[1]] = path
    traces = traces[:, :, keep]
    targets = np.nan_to_num(body_positions(model, states, robot_root(model))) * walks(model)
    stride = frames[1] - frames[0] if len(frames) > 1 else 1
    return {
        "dt": stride * recording.problem.dynamics.dt,
        "frames": len(frames),
        "steps_of_frame": frames,
        "geoms": [shape(model, g) for g in visible],
        "poses": pack(poses),
        "traces": pack(traces),
        "traces_shape": traces.shape,
        "targets": pack(targets),
        "camera": view(model, poses[0], visible, targets[0]),
        "returns": [0.0, *(round(float(np.nan_to_num(row["return"])), 3) for row in recording.rows)],
    }


def pack(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def view(model: mujoco.MjModel, poses: np.ndarray, visible: list[int], target: np.ndarray) -> dict[str, Any]:
    """A camera that sees all that is not floor; `offset` is what it adds to the robot that it follows."""
    solid = [j for j, g in enumerate(visible) if model.geom_type[g] != mujoco.mjtGeom.mjGEOM_PLANE]
    if walks(model):
        solid = [
            j for j in solid if model.body_rootid[model.geom_bodyid[visible[j]]] == robot_root(model)
        ] or solid
    centre, size = model.stat.center, 2 * model.stat.extent  # where nothing but floor can be seen
    if solid:
        centres, radii = poses[solid, :3], model.geom_rbound[[visible[j] for j in solid]][:, None]
        low, high = (centres - radii).min(0), (centres + radii).max(0)
        centre, size = (low + high) / 2, np.linalg.norm(high - low)
    return {
        "target": centre.tolist(),
        "offset": (centre - target).tolist(),
        "distance": float(1.25 * size),
        "azimuth": 70.0 if walks(model) else 90.0,
        "elevation": -18.0 if walks(model) else -32.0,
    }


def shape(model: mujoco.MjModel, g: int) -> dict[str, Any] | None:
    """A geom for the viewer, or None where it cannot or should not be drawn."""
    kind, rgba = _TYPES.get(mujoco.mjtGeom(model.geom_type[g])), colour(model, g)
    if kind is None or rgba[3] < 0.02:
        return None
    geom = {"type": kind, "size": model.geom_size[g].round(5).tolist(), "rgba": rgba.round(3).tolist()}
    return geom | hull(model, model.geom_dataid[g]) if kind == "mesh" else geom


def colour(model: mujoco.MjModel, g: int) -> np.ndarray:
    """RGBA (4,) of a geom, or of its material."""
    rgba: np.ndarray = model.geom_rgba[g]
    if model.geom_matid[g] >= 0 and np.array_equal(rgba, _GREY):
        rgba = model.mat_rgba[model.geom_matid[g]]
    return rgba


def hull(model: mujoco.MjModel, mesh: int) -> dict[str, Any]:
    """A convex outline of a mesh: its extreme vertices in directions spread evenly over the sphere."""
    start = model.mesh_vertadr[mesh]
    vertices = model.mesh_vert[start : start + model.mesh_vertnum[mesh]].astype(float)
    i = np.arange(HULL_DIRECTIONS) + 0.5
    z, angle = 1 - 2 * i / HULL_DIRECTIONS, np.pi * (1 + 5**0.5) * i  # Fibonacci sphere
    directions = np.stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z], -1)
    points = vertices[np.unique((vertices @ directions.T).argmax(0))]
    try:
        found = ConvexHull(points)
    except QhullError:  # flat meshes
        return {"vertices": [], "faces": []}
    faces = found.simplices.copy()
    a, b, c = points[faces].swapaxes(0, 1)
    inward = (np.cross(b - a, c - a) * found.equations[:, :3]).sum(-1) < 0
    faces[inward] = faces[inward][:, ::-1]
    return {"vertices": points.round(5).tolist(), "faces": faces.tolist()}
