// A small robot viewer: canvas 2D, painter's algorithm, no libraries. `start(canvas, scene)` is all.
"use strict";

const V = {
  sub: (a, b) => [a[0] - b[0], a[1] - b[1], a[2] - b[2]],
  dot: (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2],
  cross: (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]],
  unit: (a) => { const n = Math.hypot(...a) || 1; return [a[0] / n, a[1] / n, a[2] / n]; },
};
const LIGHT = V.unit([0.35, -0.5, 1.0]);
const NEAR = 0.02;

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

// Closed surface of revolution about z: rings of [radius x, radius y, z], joined by quads.
function lathe(rings, n) {
  const vertices = [], faces = [];
  for (const [rx, ry, z] of rings)
    for (let i = 0; i < n; i++) {
      const a = (2 * Math.PI * i) / n;
      vertices.push([rx * Math.cos(a), ry * Math.sin(a), z]);
    }
  for (let r = 0; r + 1 < rings.length; r++)
    for (let i = 0; i < n; i++) {
      const j = (i + 1) % n;
      faces.push([r * n + i, r * n + j, (r + 1) * n + j, (r + 1) * n + i]);
    }
  return { vertices, faces };
}

function dome(r, up, from, to, steps) {
  const rings = [];
  for (let k = 0; k <= steps; k++) {
    const a = from + ((to - from) * k) / steps;
    rings.push([Math.max(1e-4, Math.cos(a)) * r[0], Math.max(1e-4, Math.cos(a)) * r[1], up + Math.sin(a) * r[2]]);
  }
  return rings;
}

function mesh(geom) {
  const [a, b, c] = geom.size, q = Math.PI / 2;
  switch (geom.type) {
    case "sphere": return lathe(dome([a, a, a], 0, -q, q, 14), 24);
    case "ellipsoid": return lathe(dome([a, b, c], 0, -q, q, 14), 24);
    case "capsule": {
      const side = [];  // in pieces, so that faces sort well against other geoms
      for (let k = 1; k < 4; k++) side.push([a, a, b * (k / 2 - 1)]);
      return lathe([...dome([a, a, a], -b, -q, 0, 4), ...side, ...dome([a, a, a], b, 0, q, 4)], 20);
    }
    case "cylinder": return lathe([[1e-4, 1e-4, -b], [a, a, -b], [a, a, 0], [a, a, b], [1e-4, 1e-4, b]], 24);
    case "box": {
      const vertices = [];
      for (const z of [-c, c]) for (const [x, y] of [[-a, -b], [a, -b], [a, b], [-a, b]]) vertices.push([x, y, z]);
      const faces = [[3, 2, 1, 0], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]];
      return { vertices, faces };
    }
    case "mesh": return { vertices: geom.vertices, faces: geom.faces };
    default: return { vertices: [], faces: [] };
  }
}

function rotation([w, x, y, z]) {
  return [
    [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
    [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
    [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
  ];
}

class Camera {
  constructor(scene) {
    Object.assign(this, { azimuth: scene.camera.azimuth, elevation: scene.camera.elevation });
    this.distance = scene.camera.distance;
    this.target = [...scene.camera.target];
  }
  aim(width, height) {
    const az = (this.azimuth * Math.PI) / 180, el = (this.elevation * Math.PI) / 180;
    const forward = [Math.cos(el) * Math.cos(az), Math.cos(el) * Math.sin(az), Math.sin(el)];
    this.right = [Math.sin(az), -Math.cos(az), 0];
    this.up = V.cross(this.right, forward);
    this.forward = forward;
    this.eye = this.target.map((t, i) => t - this.distance * forward[i]);
    this.focal = 1.25 * Math.min(width * 0.72, height);
    this.cx = width / 2; this.cy = height / 2;
  }
  project(p) {
    const d = V.sub(p, this.eye), depth = V.dot(d, this.forward);
    const s = this.focal / Math.max(depth, NEAR);
    return [this.cx + s * V.dot(d, this.right), this.cy - s * V.dot(d, this.up), depth];
  }
}

function polygon(ctx, points) {
  ctx.moveTo(points[0][0], points[0][1]);
  for (let i = 1; i < points.length; i++) ctx.lineTo(points[i][0], points[i][1]);
  ctx.closePath();
}

// Checkerboard of a plane geom around the point looked at, fading out with distance.
function drawPlane(ctx, camera, plane, pose, colors) {
  const R = rotation(pose.quat), [a, b] = plane.size, bounded = a > 0 && b > 0;
  const small = bounded && Math.max(a, b) < 4 * camera.distance;
  const local = (p) => { const d = V.sub(p, pose.position); return [0, 1].map((k) => R[0][k] * d[0] + R[1][k] * d[1] + R[2][k] * d[2]); };
  const world = (x, y) => pose.position.map((o, i) => o + R[i][0] * x + R[i][1] * y);
  const cell = small ? Math.max(a, b) / 8 : camera.cell;
  const [cx, cy] = small ? [0, 0] : local(camera.target), n = small ? 8 : 28;
  if (small) {
    const corners = [[-a, -b], [a, -b], [a, b], [-a, b]].map(([x, y]) => camera.project(world(x, y)));
    if (corners.every((p) => p[2] > NEAR)) { ctx.beginPath(); polygon(ctx, corners); ctx.fillStyle = colors.floor; ctx.fill(); }
  }
  const ix = Math.round(cx / cell), iy = Math.round(cy / cell);
  ctx.fillStyle = colors.checker;
  for (let i = ix - n; i < ix + n; i++)
    for (let j = iy - n; j < iy + n; j++) {
      if ((i + j) & 1) continue;
      if (bounded && (Math.abs((i + 0.5) * cell) > a || Math.abs((j + 0.5) * cell) > b)) continue;
      const points = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([p, q]) => camera.project(world((i + p) * cell, (j + q) * cell)));
      if (points.some((p) => p[2] < 4 * NEAR)) continue;
      const far = Math.hypot((i + 0.5) * cell - cx, (j + 0.5) * cell - cy) / (n * cell);
      ctx.globalAlpha = small ? 1 : Math.max(0, 1 - far * far);
      ctx.beginPath(); polygon(ctx, points); ctx.fill();
    }
  ctx.globalAlpha = 1;
}

function start(root, scene) {
  const canvas = root.querySelector("canvas"), ctx = canvas.getContext("2d");
  const el = (name) => root.querySelector(`[data-role=${name}]`);
  const poses = floats(scene.poses), traces = floats(scene.traces), targets = floats(scene.targets);
  const G = scene.geoms.length, F = scene.frames, [, N, P] = scene.traces_shape;
  const shapes = scene.geoms.map(mesh);
  const camera = new Camera(scene);
  const decade = 10 ** Math.floor(Math.log10(camera.distance / 8));
  camera.cell = decade * [1, 2, 5].find((m) => m * decade >= camera.distance / 8 || m === 5);
  let time = 0, playing = true, follow = true, speed = 1, last = null, dirty = true;
  const duration = Math.max(1e-9, (F - 1) * scene.dt);

  const pose = (f, g) => {
    const o = 7 * (f * G + g);
    return { position: [poses[o], poses[o + 1], poses[o + 2]], quat: poses.subarray(o + 3, o + 7) };
  };

  function resize() {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    canvas.width = canvas.clientWidth * ratio; canvas.height = canvas.clientHeight * ratio;
    draw();  // at once: resizing has cleared the canvas
  }

  function draw() {
    const style = getComputedStyle(root), color = (name) => style.getPropertyValue(name).trim();
    const width = canvas.width, height = canvas.height, f = Math.min(F - 1, Math.round(time / scene.dt));
    if (follow) for (const i of [0, 1]) camera.target[i] = scene.camera.offset[i] + targets[3 * f + i];
    camera.aim(width, height);
    const sky = ctx.createLinearGradient(0, 0, 0, height);
    sky.addColorStop(0, color("--sky-top")); sky.addColorStop(1, color("--sky-bottom"));
    ctx.fillStyle = sky; ctx.fillRect(0, 0, width, height);

    let ground = null;
    scene.geoms.forEach((geom, g) => {
      if (geom.type !== "plane") return;
      const at = pose(f, g);
      if (ground === null || at.position[2] > ground) ground = at.position[2];
      drawPlane(ctx, camera, geom, at, { floor: color("--floor"), checker: color("--checker") });
    });

    const faces = [];
    const shadow = new Path2D();
    scene.geoms.forEach((geom, g) => {
      const { vertices, faces: polygons } = shapes[g];
      if (!vertices.length) return;
      const { position, quat } = pose(f, g), R = rotation(quat);
      const world = vertices.map((v) => position.map((o, i) => o + R[i][0] * v[0] + R[i][1] * v[1] + R[i][2] * v[2]));
      const screen = world.map((p) => camera.project(p));
      const dropped = ground === null ? null : world.map((p) => {
        const k = (p[2] - ground) / LIGHT[2];
        return camera.project([p[0] - k * LIGHT[0], p[1] - k * LIGHT[1], ground + 1e-4]);
      });
      for (const face of polygons) {
        const corner = (i) => world[face[i]];
        const n = V.unit(face.length === 4
          ? V.cross(V.sub(corner(2), corner(0)), V.sub(corner(3), corner(1)))  // diagonals: poles have no edge
          : V.cross(V.sub(corner(1), corner(0)), V.sub(corner(2), corner(0))));
        const lit = V.dot(n, LIGHT);
        if (lit > 0 && dropped && geom.rgba[3] > 0.3 && face.every((i) => world[i][2] > ground && dropped[i][2] > NEAR))
          polygon(shadow, face.map((i) => dropped[i]));
        if (V.dot(n, V.sub(world[face[0]], camera.eye)) >= 0) continue;
        if (face.some((i) => screen[i][2] < NEAR)) continue;
        const half = V.unit(LIGHT.map((l, i) => l - camera.forward[i]));
        const shade = 0.62 + 0.42 * Math.max(0, lit) + 0.1 * lit, shine = 32 * Math.max(0, V.dot(n, half)) ** 24;
        const rgb = geom.rgba.slice(0, 3).map((c) => Math.min(255, Math.round(255 * (0.07 + 0.93 * c) * shade + shine)));
        let depth = 0;
        for (const i of face) depth += screen[i][2];
        faces.push([depth / face.length, face.map((i) => screen[i]), `rgba(${rgb},${geom.rgba[3]})`, geom.rgba[3]]);
      }
    });
    ctx.fillStyle = color("--shadow");
    ctx.fill(shadow, "nonzero");
    faces.sort((a, b) => b[0] - a[0]);
    ctx.lineWidth = 0.9; ctx.lineJoin = "round";
    for (const [, points, fill, alpha] of faces) {
      ctx.beginPath(); polygon(ctx, points);
      ctx.fillStyle = fill; ctx.fill();
      if (alpha > 0.99) { ctx.strokeStyle = fill; ctx.stroke(); }  // hides the seams of antialiasing
    }
    if (el("plans").checked) drawPlans(f, color);
    const step = scene.steps_of_frame[f];
    el("clock").textContent = `${(f * scene.dt).toFixed(2)} s   step ${step}   return ${scene.returns[step].toFixed(1)}`;
    el("scrub").value = String(f);
    const share = F > 1 ? f / (F - 1) : 0;
    for (const line of document.querySelectorAll(".cursor")) {
      const x = Number(line.dataset.x0) + share * (line.dataset.x1 - line.dataset.x0);
      line.setAttribute("x1", x); line.setAttribute("x2", x); line.style.display = "inline";
    }
  }

  function drawPlans(f, color) {
    const scale = canvas.width / canvas.clientWidth;
    for (let n = N - 1; n >= 0; n--) {
      ctx.beginPath();
      let pen = false;
      for (let k = 0; k < P; k++) {
        const o = 3 * ((f * N + n) * P + k);
        const p = camera.project([traces[o], traces[o + 1], traces[o + 2]]);
        if (!isFinite(p[0]) || p[2] < NEAR) { pen = false; continue; }
        pen ? ctx.lineTo(p[0], p[1]) : ctx.moveTo(p[0], p[1]);
        pen = true;
      }
      ctx.strokeStyle = color(n ? "--candidate" : "--plan");
      ctx.lineWidth = (n ? 1.3 : 3.2) * scale;
      ctx.globalAlpha = n ? 0.7 : 1;
      ctx.stroke();
    }
    ctx.globalAlpha = 1;
  }

  function tick(now) {
    if (playing && last !== null) {
      time += (speed * (now - last)) / 1000;
      if (time > duration + 0.6) time = 0;  // a short rest on the last frame
      dirty = true;
    }
    last = now;
    if (dirty) { dirty = false; draw(); }
    requestAnimationFrame(tick);
  }

  const setPlaying = (on) => { playing = on; el("play").textContent = on ? "Pause" : "Play"; };
  el("scrub").max = String(F - 1);
  el("scrub").addEventListener("input", (e) => { setPlaying(false); time = e.target.value * scene.dt; dirty = true; });
  el("play").addEventListener("click", () => { if (!playing && time >= duration) time = 0; setPlaying(!playing); });
  el("speed").addEventListener("change", (e) => { speed = Number(e.target.value); });
  el("follow").addEventListener("change", (e) => { follow = e.target.checked; dirty = true; });
  el("plans").addEventListener("change", () => { dirty = true; });
  let drag = null;
  canvas.addEventListener("pointerdown", (e) => { drag = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointermove", (e) => {
    if (!drag) return;
    camera.azimuth -= 0.35 * (e.clientX - drag[0]);
    camera.elevation = Math.max(-89, Math.min(10, camera.elevation - 0.35 * (e.clientY - drag[1])));
    drag = [e.clientX, e.clientY]; dirty = true;
  });
  canvas.addEventListener("wheel", (e) => {
    e.preventDefault();
    camera.distance *= Math.exp(0.001 * e.deltaY); dirty = true;
  }, { passive: false });
  canvas.addEventListener("keydown", (e) => {
    if (e.key === " ") { e.preventDefault(); el("play").click(); }
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (step) { e.preventDefault(); setPlaying(false); time = Math.max(0, Math.min(duration, time + step * scene.dt)); dirty = true; }
  });
  new ResizeObserver(resize).observe(canvas);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { dirty = true; });
  // A moment worth looking at before anything moves, and for those who asked for less motion.
  if (window.matchMedia("(prefers-reduced-motion: reduce)").matches) setPlaying(false);
  if (location.hash.startsWith("#t=")) { time = Number(location.hash.slice(3)); setPlaying(false); }
  requestAnimationFrame(tick);
}
