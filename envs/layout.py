"""Layout: which fields of MuJoCo's MjData make up the output y that a task reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from mbrl.errors import ContractError, UnknownName

# The kind of object that the rows of a field belong to, so that "xpos/torso" means something.
_OBJECT = {
    **dict.fromkeys(
        ("xpos", "xquat", "xmat", "xipos", "ximat", "cinert", "cvel", "cacc", "cfrc_int"), "body"
    ),
    **dict.fromkeys(("cfrc_ext", "subtree_com", "subtree_linvel", "subtree_angmom", "xfrc_applied"), "body"),
    **dict.fromkeys(("geom_xpos", "geom_xmat"), "geom"),
    **dict.fromkeys(("site_xpos", "site_xmat"), "site"),
    **dict.fromkeys(("ten_length", "ten_velocity"), "tendon"),
    **dict.fromkeys(("actuator_force", "actuator_length", "actuator_velocity", "ctrl"), "actuator"),
    **dict.fromkeys(("mocap_pos", "mocap_quat"), "mocap"),
}


@dataclass(frozen=True)
class _Field:
    source: str  # the MjData field
    index: Any  # of its first axis, or slice(None)
    slice: slice  # where it stands in y


class Layout:
    """y = [field, field, …], each a whole MjData field or one object's row of it.

    A name is an MjData field ("qpos", "time", "cfrc_ext") or a field and an object of the model
    ("xpos/torso", "site_xpos/tip", "sensordata/gyro", "qpos/knee" for a joint). Derived fields hold
    what MjData holds after `mj_step`: they lag the state by one physics step.

        layout = Layout(model, ("qpos", "qvel", "site_xpos/tip"))
        tip = y[..., layout["site_xpos/tip"]]          # (..., 3)

    Raises:
        ContractError: no field, or one twice.
        UnknownName: no such field, or no such object in the model.
    """

    def __init__(self, model: mujoco.MjModel, names: Sequence[str]):
        if isinstance(names, str) or not names:
            raise ContractError(
                f'Layout needs a sequence of fields, such as ("qpos", "qvel"), but got {names!r}.'
            )
        if len(set(names)) != len(names):
            raise ContractError(f"Layout needs each field once, but got {', '.join(names)}.")
        data = mujoco.MjData(model)
        self.names = tuple(names)
        self._fields: dict[str, _Field] = {}
        start = 0
        for name in names:
            source, _, item = name.partition("/")
            if source not in mujoco.batch.DATA_FIELDS:
                raise UnknownName("MjData field", source, mujoco.batch.DATA_FIELDS)
            index = _rows(model, source, item) if item else slice(None)
            size = np.atleast_1d(getattr(data, source))[index].size
            self._fields[name] = _Field(source, index, slice(start, start + size))
            start += size
        self.size = start

    @property
    def sources(self) -> frozenset[str]:
        """The MjData fields that are read."""
        return frozenset(field.source for field in self._fields.values())

    def on(self, model: mujoco.MjModel) -> Layout:
        """The same fields of another model, which may number its objects differently.

        Raises:
            ContractError: a field has another size there.
            UnknownName: an object does not exist there.
        """
        other = Layout(model, self.names)
        for name in self.names:
            if other[name] != self[name]:
                raise ContractError(
                    f"The models need fields of one size, but {name!r} has {_width(self[name])} numbers "
                    f"in one and {_width(other[name])} in the other."
                )
        return other

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> slice:
        """Where `name` stands in y."""
        if name not in self._fields:
            raise UnknownName("field of this layout", name, self.names)
        return self._fields[name].slice

    def read(self, source: Mapping[str, np.ndarray] | mujoco.MjData, out: np.ndarray) -> None:
        """Write y into `out`: (ny,) from an MjData, or (n, ny) from fields (n, ...)."""
        if isinstance(source, mujoco.MjData):
            for field in self._fields.values():
                out[field.slice] = np.atleast_1d(getattr(source, field.source))[field.index].ravel()
            return
        n = out.shape[0]
        for field in self._fields.values():
            values = source[field.source]
            if field.index != slice(None):
                values = values[:, field.index]
            out[:, field.slice] = values[:n].reshape(n, -1)


def _width(where: slice) -> int:
    return int(where.stop - where.start)


def _rows(model: mujoco.MjModel, source: str, item: str) -> slice:
    """The rows of MjData field `source` that belong to the object called `item` (or its number)."""
    if source == "sensordata":
        i = _id(model, "sensor", item)
        return slice(model.sensor_adr[i], model.sensor_adr[i] + model.sensor_dim[i])
    if source in ("qpos", "qvel"):
        joint = model.joint(_id(model, "joint", item))
        address = joint.qposadr[0] if source == "qpos" else joint.dofadr[0]
        kind = mujoco.mjtJoint(joint.type[0])
        position, velocity = {
            mujoco.mjtJoint.mjJNT_FREE: (7, 6),
            mujoco.mjtJoint.mjJNT_BALL: (4, 3),
        }.get(kind, (1, 1))
        return slice(address, address + (position if source == "qpos" else velocity))
    if source not in _OBJECT:
        raise ContractError(
            f"Field {source!r} has no rows by name; those that have: "
            f"{', '.join(sorted((*_OBJECT, 'qpos', 'qvel', 'sensordata')))}."
        )
    if _OBJECT[source] == "mocap":
        i = int(model.body_mocapid[_id(model, "body", item)])
        if i < 0:
            moved = [model.body(k).name or str(k) for k in np.flatnonzero(model.body_mocapid >= 0)]
            raise ContractError(
                f"Field {source!r} has rows of mocap bodies only, and {item!r} is none; "
                f"those that are: {', '.join(moved) or 'none'}."
            )
    else:
        i = _id(model, _OBJECT[source], item)
    return slice(i, i + 1)


def _id(model: mujoco.MjModel, kind: str, item: str) -> int:
    count = {"body": model.nbody, "geom": model.ngeom, "site": model.nsite, "sensor": model.nsensor}
    count |= {"tendon": model.ntendon, "actuator": model.nu, "joint": model.njnt}
    if item.isdigit() and int(item) < count[kind]:
        return int(item)
    names = [getattr(model, kind)(i).name for i in range(count[kind])]
    if item not in names:
        raise UnknownName(kind, item, [name for name in names if name])
    return names.index(item)
