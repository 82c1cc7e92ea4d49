"""The slowdown of bf16 is measured: of the time that products take, not of the clock's noise."""

from unittest import mock

from thinned.runs import cpu_precision


def test_slowdown_is_the_ratio_of_the_best_times() -> None:
    ticks = iter(
        [0, 9, 10, 16, 20, 28, 30, 37, *(t for i in range(4) for t in (40 + i, 40 + i + [0.75, 0.5, 0.9, 0.6][i]))]
    )
    with mock.patch.object(cpu_precision.time, "perf_counter", side_effect=ticks):
        assert cpu_precision.bf16_slowdown(2) == 12


def test_it_is_measured_here() -> None:
    assert 0 < cpu_precision.bf16_slowdown(64) < 1e6
