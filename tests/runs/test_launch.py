"""The Trainer is told as many devices and nodes as a launcher has started processes for."""

from types import SimpleNamespace
from typing import Any

import pytest

from thinned.runs.launch import fill_in_from_launcher

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "thinned"}


class Config(SimpleNamespace):
    """Of a Trainer, read by attribute and by key, as jsonargparse's."""

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def started(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
class TestStarted:
    @pytest.mark.parametrize("given", ["auto", -1, "-1", 4, "4", "0,1,2,3", [0, 1, 2, 3]])
    @pytest.mark.parametrize("num_nodes", [1, 2])
    def test_filled_in(self, environment: Any, given: Any, num_nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        started(monkeypatch, environment)
        config = Config(devices=given, num_nodes=num_nodes)
        fill_in_from_launcher(config)
        assert config.num_nodes == 2
        assert config.devices == (4 if given in ("auto", -1, "-1") else given)

    @pytest.mark.parametrize(
        ("devices", "num_nodes", "message"),
        [
            (1, 1, r"Expected trainer\.devices to be 4 or auto, .* 8 processes on 2 nodes, but got 1"),
            ("0,1", 2, r"Expected trainer\.devices to be 4 or auto, .*, but got 0,1"),
            ("auto", 3, r"Expected trainer\.num_nodes to be 2, .*, but got 3"),
        ],
    )
    def test_contradiction(
        self, environment: Any, devices: Any, num_nodes: int, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started(monkeypatch, environment)
        with pytest.raises(ValueError, match=message):
            fill_in_from_launcher(Config(devices=devices, num_nodes=num_nodes))


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_nodes_with_different_numbers_of_processes(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, TORCHRUN | {"WORLD_SIZE": "7"} if launcher == "torchrun" else SRUN | {"SLURM_NTASKS": "7"})
    with pytest.raises(
        ValueError, match=f"Expected {launcher} to start as many processes on each node, but got 7 on 2"
    ):
        fill_in_from_launcher(Config(devices="auto", num_nodes=1))


def test_nothing_is_filled_in_without_a_launcher() -> None:
    config = Config(devices="auto", num_nodes=1)
    fill_in_from_launcher(config)
    assert (config.devices, config.num_nodes) == ("auto", 1)


def test_several_nodes_need_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(devices="auto", num_nodes=2)
    with pytest.raises(ValueError, match=r"Expected torchrun or srun, .* for trainer\.num_nodes=2, but got none"):
        fill_in_from_launcher(config)
    monkeypatch.setenv("MASTER_ADDR", "node0")  # then Lightning takes NODE_RANK
    fill_in_from_launcher(config)
    assert config.devices == "auto"
