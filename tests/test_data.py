"""Transitions and replay: nothing bad gets in, nothing is lost, windows never cross an end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from mbrl import ContractError, Replay, Transition
from mbrl.data import runs


def steps(*lengths: int, first: int = 0, terminated: bool = True) -> Transition:
    """Episodes in which y = (episode, time), u = -time and reward = 10·episode + time; each ends."""
    episode = torch.cat([torch.full((n,), first + e) for e, n in enumerate(lengths)])
    time = torch.cat([torch.arange(n) for n in lengths])
    last = torch.cat([torch.arange(n) == n - 1 for n in lengths])
    y = torch.stack([episode, time], -1).float()
    return Transition(
        y=y,
        u=-time[:, None].float(),
        reward=10.0 * episode + time,
        y_next=y + torch.tensor([0.0, 1.0]),
        terminated=last & terminated,
        truncated=last & (not terminated),
        episode=episode,
    )


def equal(a: Transition, b: Transition) -> bool:
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def spoiled(transition: Transition, name: str, row: int, value: float) -> Transition:
    bad = getattr(transition, name).clone()
    bad[row] = value
    return dataclasses.replace(transition, **{name: bad})


@pytest.mark.parametrize("name", ["y", "u", "reward", "y_next"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name_row_and_episode(name: str, value: float) -> None:
    replay = Replay(10, 2, 1)
    replay.add(steps(2))
    with pytest.raises(ContractError, match=rf"{name} is {value} in row 3 \(episode 8\).*End the episode"):
        replay.add(spoiled(steps(2, 3, first=7), name, 3, value))
    assert equal(replay.all(), steps(2))


def test_the_number_of_bad_rows_is_told() -> None:
    bad = spoiled(spoiled(steps(4), "y", 1, torch.nan), "y", 2, torch.inf)
    with pytest.raises(ContractError, match=r"y is nan in row 1 \(episode 0\), and in 1 more"):
        bad.check()


def test_what_overflows_in_the_buffers_dtype_is_refused() -> None:
    wide = steps(3).to("cpu", torch.float64)
    big = spoiled(wide, "reward", 1, 1e300)
    big.check()
    replay = Replay(10, 2, 1)
    with pytest.raises(ContractError, match="reward is inf in row 1"):
        replay.add(big)
    assert len(replay) == 0
    replay.add(wide)
    assert equal(replay.all(), steps(3))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y", torch.zeros(3), r"y needs the shape \(3, 3\)"),
        ("u", torch.zeros(2, 1), r"u needs the shape \(3, 1\).*has \(2, 1\)"),
        ("y_next", torch.zeros(3, 4), r"y_next needs the shape \(3, 2\)"),
        ("terminated", torch.zeros(3, 1, dtype=torch.bool), r"terminated needs the shape \(3,\)"),
        ("terminated", torch.zeros(3), "terminated has the dtype torch.float32"),
        ("episode", torch.zeros(3, dtype=torch.int32), "episode has the dtype torch.int32"),
        ("reward", torch.zeros(3, dtype=torch.float64), "reward has the dtype torch.float64"),
        ("y", torch.zeros(3, 2, dtype=torch.int64), "y has the dtype torch.int64"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused_by_name(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        dataclasses.replace(steps(3), **{name: value}).check()


def test_other_sizes_than_the_buffers_are_refused() -> None:
    with pytest.raises(ContractError, match=r"holds \(ny, nu\) = \(3, 1\), but got \(2, 1\)"):
        Replay(10, 3, 1).add(steps(2))


@given(st.integers(1, 12), st.lists(st.integers(0, 20), max_size=6))
def test_the_newest_are_kept_in_order(capacity: int, batches: list[int]) -> None:
    replay, expected = Replay(capacity, 2, 1), list[float]()
    for n in batches:
        batch = dataclasses.replace(steps(max(n, 1))[:n], reward=len(expected) + torch.arange(n).float())
        replay.add(batch)
        expected += batch.reward.tolist()
        assert len(replay) == min(len(expected), capacity)
        assert replay.all().reward.tolist() == expected[-capacity:]


def test_any_leading_shape_is_added_row_by_row() -> None:
    replay = Replay(100, 2, 1)
    many = steps(6).map(lambda value: value.reshape(2, 3, *value.shape[1:]))
    replay.add(many)
    replay.add(steps(2)[1])  # a single transition
    assert equal(replay.all(), Transition.cat([steps(6), steps(2)[1:]]))


def test_samples_are_uniform_whole_rows_and_leave_the_global_state_alone() -> None:
    replay = Replay(5, 2, 1)
    replay.add(steps(7))  # times 2 to 6 remain
    before = torch.get_rng_state()
    sample = replay.sample(20_000, generator=Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(sample.y[:, 1], sample.reward) and torch.equal(sample.u[:, 0], -sample.reward)
    counts = torch.bincount(sample.reward.long(), minlength=7)
    assert counts[:2].sum() == 0
    # Binomial(20000, 1/5) has a standard deviation of 57.
    assert (counts[2:] - 4000).abs().max() < 5 * 57
    again = replay.sample(20_000, generator=Generator().manual_seed(0))
    assert equal(sample, again)


def test_an_empty_buffer_has_nothing_to_sample() -> None:
    replay = Replay(5, 2, 1)
    replay.add(steps(3))
    replay.clear()
    assert len(replay) == 0 and len(replay.all().reward) == 0
    assert replay.trajectories(2)[0].shape == (0, 3, 2)
    with pytest.raises(ContractError, match="empty.*Add transitions first"):
        replay.sample(1, generator=Generator())


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(1, 8),
    st.integers(1, 30),
    st.randoms(use_true_random=False),
)
def test_windows_stay_within_episodes(lengths: list[int], length: int, capacity: int, random: object) -> None:
    """Episodes arrive interleaved, as from a vector of environments, and the oldest rows are overwritten."""
    parts = [steps(n, first=e) for e, n in enumerate(lengths)]
    queue = [e for e, n in enumerate(lengths) for _ in range(n)]
    random.shuffle(queue)  # type: ignore[attr-defined]
    replay = Replay(capacity, 2, 1)
    seen = [0] * len(lengths)
    for e in queue:
        replay.add(parts[e][seen[e] : seen[e] + 1])
        seen[e] += 1
    y, u = replay.trajectories(length)

    kept = queue[-capacity:]
    expected = []
    for e, n in enumerate(lengths):
        first = n - kept.count(e)  # of what was not overwritten
        expected += [[(e, t + i) for i in range(length + 1)] for t in range(first, n - length + 1)]
    assert y.shape == (len(expected), length + 1, 2) and u.shape == (len(expected), length, 1)
    assert y.long().tolist() == [[list(point) for point in window] for window in expected]
    assert torch.equal(u[..., 0], -y[:, :-1, 1])


def test_an_episodes_end_cuts_even_where_its_number_is_used_again() -> None:
    replay = Replay(20, 2, 1)
    replay.add(steps(3))
    replay.add(steps(4, terminated=False))
    y, _ = replay.trajectories(3)
    assert y[:, :, 1].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4]]


@pytest.mark.parametrize("rows", [[0, 2], [1, 0]])
def test_steps_left_out_or_out_of_order_are_refused(rows: list[int]) -> None:
    with pytest.raises(ContractError, match="Row 1, of episode 0, does not start where.*in order of time"):
        runs(steps(3)[rows])


def test_windows_need_a_step() -> None:
    with pytest.raises(ContractError, match="at least 1 step, but got 0"):
        Replay(5, 2, 1).trajectories(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capacity", [6, 9])
def test_a_restored_buffer_goes_on_exactly(capacity: int, dtype: torch.dtype) -> None:
    replay, copy = Replay(6, 2, 1, dtype=dtype), Replay(capacity, 2, 1, dtype=dtype)
    replay.add(steps(4, 5))  # has wrapped
    copy.add(steps(2))
    state = replay.state_dict()
    copy.load_state_dict(state)
    assert len(copy) == 6 and equal(copy.all(), replay.all())
    one, two = (r.sample(50, generator=Generator().manual_seed(3)) for r in (replay, copy))
    assert equal(one, two)
    replay.add(steps(3, first=9))
    assert state["episode"].max() == 1, "the state is a copy"
    copy.add(steps(3, first=9))
    assert equal(copy.all()[-6:], replay.all())


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        (Replay(3, 2, 1), "has 4 transitions, but Replay holds 3"),
        (Replay(9, 3, 1), r"\(ny, nu\) = \(3, 1\)"),
        (Replay(9, 2, 1, dtype=torch.float64), "holds torch.float64, but the state has torch.float32"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(replay: Replay, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        replay.load_state_dict(steps(4).tensors())
    assert len(replay) == 0


def test_a_state_needs_all_fields() -> None:
    state = steps(4).tensors()
    del state["truncated"]
    with pytest.raises(ContractError, match="with the keys .*truncated.* but got episode, reward"):
        Replay(9, 2, 1).load_state_dict(state)


def test_more_than_the_memory_is_refused_before_it_is_asked_for() -> None:
    with pytest.raises(
        ContractError, match=r"GiB for 10{14} transitions.*cpu has .* GiB available.*below \d+"
    ):
        Replay(10**14, 20, 6)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ContractError, match="at least 1, but got 0, 2 and 1"):
        Replay(0, 2, 1)
