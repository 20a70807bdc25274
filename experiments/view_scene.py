"""A robot, its plan and the plans it considered, drawn in a browser by viser."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mujoco
import numpy as np
import trimesh
import viser

from mbrl.envs import World, write_state
from mbrl.experiments.recording import robot_root
from mbrl.experiments.replay import colour
from mbrl.experiments.video import CANDIDATE, PLAN, camera

FLOOR_CELL = 1.0  # m
PUSH = (0.85, 0.20, 0.20)
_GEOM = mujoco.mjtGeom


class Scene:
    """The nodes of a scene. Everything hangs on /world, which is moved against the robot that is followed.

    So the camera is each watcher's own, and turning it is never disturbed.

    Args:
        body: whose path is drawn, and which is pushed.
    """

    def __init__(self, server: viser.ViserServer, world: World, body: int):
        self._scene, self._model, self._body = server.scene, world.model, body
        self._data = mujoco.MjData(world.model)
        mujoco.mj_forward(world.model, self._data)
        self._root = robot_root(world.model)
        self._scene.set_up_direction("+z")
        self._world = self._scene.add_frame("/world", show_axes=False)
        self._bodies = [self._add_body(b) for b in range(world.model.nbody)]
        self._floor: viser.GridHandle | None = None
        for g in range(world.model.ngeom):
            if world.model.geom_type[g] == _GEOM.mjGEOM_PLANE and self._floor is None:
                self._floor = self._add_floor(g)
        size = self._size()
        self._plan = self._add_lines("/world/plan", PLAN[:3], 6.0)
        self._candidates = self._add_lines("/world/candidates", CANDIDATE[:3], 2.0)
        self._arrow = 0.5 * size
        self._push = self._scene.add_arrows(
            "/world/push",
            np.zeros((1, 2, 3)),
            _rgb(PUSH),
            shaft_radius=0.015 * size,
            head_radius=0.04 * size,
            head_length=0.12 * size,
            visible=False,
        )
        self._look(server, world)

    def _size(self) -> float:
        """Of the robot, m."""
        model = self._model
        own = model.body_rootid[model.geom_bodyid] == self._root
        centres, radii = self._data.geom_xpos[own], model.geom_rbound[own][:, None]
        if not len(centres):
            return float(model.stat.extent)
        return float(np.linalg.norm((centres + radii).max(0) - (centres - radii).min(0)))

    def _look(self, server: viser.ViserServer, world: World) -> None:
        """Look as the world's pictures do, a little further away for the panel at the side."""
        view = camera(world)
        azimuth, elevation = math.radians(view.azimuth), math.radians(view.elevation)
        forward = np.array(
            [
                math.cos(elevation) * math.cos(azimuth),
                math.cos(elevation) * math.sin(azimuth),
                math.sin(elevation),
            ]
        )
        at = np.array(view.lookat)
        if view.type == mujoco.mjtCamera.mjCAMERA_TRACKING:
            at = self._data.subtree_com[view.trackbodyid] * [0, 0, 1]
        server.initial_camera.fov = math.radians(float(world.model.vis.global_.fovy))
        server.initial_camera.look_at = at
        server.initial_camera.position = at - 1.4 * view.distance * forward

    def show(self, state: np.ndarray, *, follow: bool, push: np.ndarray | None) -> None:
        """The robot in the state (nx,), and the force (3,) that pushes it."""
        write_state(self._model, self._data, np.nan_to_num(state))
        data = self._data
        for body, handle in enumerate(self._bodies):
            handle.position, handle.wxyz = data.xpos[body], data.xquat[body]
        base = data.xpos[self._root] * [1, 1, 0] if follow else np.zeros(3)
        self._world.position = -base
        if self._floor is not None:  # it seems endless
            self._floor.position = FLOOR_CELL * np.round(base / FLOOR_CELL) + [0, 0, self._floor.position[2]]
        self._push.visible = push is not None
        if push is not None:
            at = data.xipos[self._body]
            tail = at - self._arrow * push / max(float(np.linalg.norm(push)), 1e-9)
            self._push.points = np.stack([tail, at])[None]

    def show_plans(self, paths: np.ndarray) -> None:
        """Where the tracked body would go, (1 + n, H+1, 3): the plan and n candidates; or none, (0, …)."""
        _draw(self._plan, paths[:1])
        _draw(self._candidates, paths[1:])

    def _add_body(self, body: int) -> viser.FrameHandle:
        """A frame with the body's geoms, but those of the groups that MuJoCo does not show, 3 and above."""
        model = self._model
        name = f"/world/{body} {model.body(body).name}".rstrip()
        frame = self._scene.add_frame(name, show_axes=False)
        for g in np.flatnonzero(model.geom_bodyid == body).tolist():
            rgba, mesh = colour(model, g).tolist(), mesh_of(model, g)
            if mesh is not None and model.geom_group[g] <= 2 and rgba[3] >= 0.02:
                self._scene.add_mesh_simple(
                    f"{name}/{g}",
                    mesh.vertices.astype(np.float32),
                    mesh.faces.astype(np.uint32),
                    color=_rgb(rgba),
                    opacity=None if rgba[3] >= 1 else rgba[3],
                )
        return frame

    def _add_floor(self, g: int) -> viser.GridHandle:
        height = float(self._data.geom_xpos[g, 2])
        return self._scene.add_grid(
            "/world/floor",
            width=40.0,
            height=40.0,
            cell_size=FLOOR_CELL,
            section_size=5 * FLOOR_CELL,
            plane_color=(235, 238, 242),
            plane_opacity=1.0,
            shadow_opacity=0.3,
            fade_distance=30.0,
            position=(0.0, 0.0, height),
        )

    def _add_lines(self, name: str, rgb: tuple[float, ...], width: float) -> viser.LineSegmentsHandle:
        return self._scene.add_line_segments(
            name, np.zeros((1, 2, 3)), _rgb(rgb), thickness=width, thickness_units="screen", visible=False
        )


def mesh_of(model: mujoco.MjModel, g: int) -> trimesh.Trimesh | None:
    """A geom in the frame of its body, or None where it is a floor or of a kind that is not drawn."""
    kind, size = model.geom_type[g], model.geom_size[g]
    mesh: trimesh.Trimesh
    if kind == _GEOM.mjGEOM_SPHERE:
        mesh = trimesh.creation.icosphere(subdivisions=3, radius=size[0])
    elif kind == _GEOM.mjGEOM_ELLIPSOID:
        mesh = trimesh.creation.icosphere(subdivisions=3)
        mesh.apply_transform(np.diag([*size, 1.0]))
    elif kind == _GEOM.mjGEOM_CAPSULE:
        mesh = trimesh.creation.capsule(radius=size[0], height=2 * size[1], count=(24, 24))
        mesh.apply_translation(-mesh.bounds.mean(0))
    elif kind == _GEOM.mjGEOM_CYLINDER:
        mesh = trimesh.creation.cylinder(radius=size[0], height=2 * size[1], sections=32)
    elif kind == _GEOM.mjGEOM_BOX:
        mesh = trimesh.creation.box(extents=2 * size)
    elif kind == _GEOM.mjGEOM_MESH:
        i = model.geom_dataid[g]
        vertices, faces = model.mesh_vertadr[i], model.mesh_faceadr[i]
        mesh = trimesh.Trimesh(
            model.mesh_vert[vertices : vertices + model.mesh_vertnum[i]],
            model.mesh_face[faces : faces + model.mesh_facenum[i]],
            process=False,
        )
    else:
        return None
    if kind in (_GEOM.mjGEOM_BOX, _GEOM.mjGEOM_CYLINDER, _GEOM.mjGEOM_MESH):
        mesh.unmerge_vertices()  # edges stay sharp where faces share no vertex
    place, turn = np.eye(4), np.zeros(9)
    mujoco.mju_quat2Mat(turn, model.geom_quat[g])
    place[:3, :3], place[:3, 3] = turn.reshape(3, 3), model.geom_pos[g]
    mesh.apply_transform(place)
    return mesh


def _draw(lines: viser.LineSegmentsHandle, paths: np.ndarray) -> None:
    """Polylines (n, H+1, 3), without their pieces that are not finite."""
    pieces = np.stack([paths[:, :-1], paths[:, 1:]], 2).reshape(-1, 2, 3)
    pieces = pieces[np.isfinite(pieces).all((1, 2))]
    lines.visible = len(pieces) > 0
    if len(pieces):
        lines.points = pieces.astype(np.float32)


def _rgb(colour: Sequence[float]) -> tuple[int, int, int]:
    r, g, b = (round(255 * share) for share in colour[:3])
    return r, g, b
