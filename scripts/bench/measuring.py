"""Measures the times of several sides in turn, and peak memory, for the benchmarks."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

Results = dict[str, tuple[float, float]]  # seconds, and ratio to the first side


def compare(sides: Mapping[str, Callable[[], object]], repeats: int) -> Results:
    """Returns median seconds of each side, and its median ratio to the first one, run in turn after one warm-up.

    Every other turn is in reverse, as a side's time depends on the one before it. A side may return its own seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(repeats + 1):
        for name, side in list(sides.items())[:: -1 if run % 2 else 1]:
            start = time.perf_counter()
            measured = side()
            if run:
                times[name].append(measured if isinstance(measured, float) else time.perf_counter() - start)
    base = next(iter(times.values()))
    return {
        name: (statistics.median(seconds), statistics.median(s / b for s, b in zip(seconds, base, strict=True)))
        for name, seconds in times.items()
    }


def repeat(count: int, function: Callable[[int], None]) -> None:
    """Calls function(0), ..., function(count - 1)."""
    for i in range(count):
        function(i)


def show(title: str, results: Results, per: int = 1, **extra: Callable[[str, float], str]) -> None:
    """Prints a table: milliseconds of one of `per` repetitions, ratio, and columns made of name and seconds."""
    table = Table("", "ms", "ratio", *extra, title=title, title_justify="left")
    for name, (seconds, ratio) in results.items():
        columns = [column(name, seconds / per) for column in extra.values()]
        table.add_row(name, f"{1e3 * seconds / per:.2f}", f"{ratio:.3f}", *columns)
    Console().print(table)


def peak_memory(function: Callable[..., object], *args: object) -> float:
    """Returns by how many MiB the function raises the peak resident size of a fresh process (Linux only)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_rise, function, args).result()


def _rise(function: Callable[..., object], args: tuple[object, ...]) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the imports have raised
    before = _peak()
    function(*args)
    return _peak() - before


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
