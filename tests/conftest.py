"""Settings of the whole suite."""

import hypothesis
import torch

from mbrl.experiments.cli import choose_gl

choose_gl()  # before a test imports MuJoCo, as the program does

# The same examples every time, and no time limit on a machine that others use too.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("steady")


# Many small problems: threads cost more than they give, and results would depend on their number.
torch.set_num_threads(1)
