"""Writes the measured numbers into README.md, from the result files and from nowhere else.

    python -m mbrl.experiments.benchmarks.readme

Each section stands between <!-- name --> and <!-- /name -->.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mbrl.experiments.benchmarks import (
    readme_compare,
    readme_derivatives,
    readme_models,
    readme_nmpc,
    readme_simulators,
)
from mbrl.experiments.benchmarks.record import RESULTS

MISSING = "Not measured yet."
README = RESULTS.parent.parent.parent / "README.md"

SECTIONS: dict[str, Callable[[], str]] = {
    "worlds": readme_simulators.worlds,
    "headline": readme_compare.headline,
    "coverage": readme_compare.coverage,
    "fidelity": readme_simulators.fidelity,
    "throughput": readme_simulators.throughput,
    "returns": readme_simulators.returns_table,
    "endurance": readme_simulators.endurance,
    "sample-efficiency": readme_models.sample_efficiency,
    "pets-speed": readme_models.pets_speed,
    "mppi-speed": readme_models.mppi_speed,
    "honest-uncertainty": readme_models.honest_uncertainty,
    "likelihood": readme_models.likelihood,
    "swing-up": readme_derivatives.swing_up,
    "feedback": readme_derivatives.feedback_mpc,
    "jacobians": readme_derivatives.jacobians,
    "ilqr-mpc": readme_derivatives.ilqr_on_robots,
    "pushed-go2": readme_derivatives.pushed_go2,
    "ilqr-speed": readme_derivatives.ilqr_speeds,
    "jacobian-speed": readme_derivatives.jacobian_speeds,
    "nmpc-speed": readme_nmpc.nmpc_speeds,
    "trap": readme_models.trap,
    "exploration": readme_models.explorers,
    "learned-expressions": readme_nmpc.learned_expressions,
    "learned-nmpc": readme_nmpc.learned_nmpc,
    "robots": readme_simulators.robots,
    "robustness": readme_simulators.robustness,
}


def main(path: Path = README) -> None:
    text = path.read_text()
    for name, section in SECTIONS.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if opening not in text or closing not in text:
            raise SystemExit(f"README.md has no section {opening.strip()} … {closing}.")
        before, rest = text.split(opening, 1)
        text = before + opening + (section() or MISSING) + "\n" + closing + rest.split(closing, 1)[1]
    path.write_text(text)


if __name__ == "__main__":
    main()
