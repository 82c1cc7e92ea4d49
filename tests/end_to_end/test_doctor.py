"""The doctor's verdicts, each from a fact that is faked, and its exit status."""

import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "fedcba98"
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "scripts/doctor.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return module


def fake_version(name: str, value: str | None) -> Callable[..., None]:
    def fake(doctor: ModuleType, patch: pytest.MonkeyPatch) -> None:
        real = doctor.version
        patch.setattr(doctor, "version", lambda package: value if package == name else real(package))

    return fake


def fake_environment(**settings: str) -> Callable[..., None]:
    def fake(doctor: ModuleType, patch: pytest.MonkeyPatch) -> None:
        for name, value in settings.items():
            patch.setenv(name, value)

    return fake


def fake_gpus(count: int, **more: Any) -> Callable[..., None]:
    def fake(doctor: ModuleType, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        gpu = SimpleNamespace(name="H100", total_memory=80 * 2**30)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: more.get("bf16", True))
        patch.setattr(torch.distributed, "is_nccl_available", lambda: more.get("nccl", True))
        patch.setattr(doctor, "cores", lambda: 8)

    return fake


def fake(module: Any, name: str, value: Any) -> Callable[..., None]:
    """Of the module, or of the attribute of the doctor with this name."""
    return lambda doctor, patch: patch.setattr(
        getattr(doctor, module) if isinstance(module, str) else module, name, value
    )


def runs_waiting(doctor: ModuleType, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("WANDB_API_KEY", KEY)
    patch.setattr(doctor.wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(api_key=KEY)))
    for name in ("a", "b"):
        log = Path(f"runs/mlp/{name}/wandb/offline-run-{name}/run-{name}.wandb")
        log.parent.mkdir(parents=True)
        log.touch()
    Path("runs/mlp/b/wandb/offline-run-b/run-b.wandb.synced").touch()


def times_out(*_: Any, **__: Any) -> None:
    raise subprocess.TimeoutExpired("python", 300)


def refuses(*_: Any, **__: Any) -> None:
    raise ConnectionRefusedError("refused")


GONE = "W&B does not confirm the API key (no answer)"
FAILED_COMPILE = """Traceback (most recent call last):
torch.CppError: no compiler

Set TORCHDYNAMO_VERBOSE=1 for more
"""
VERDICTS = [
    ("Python", lambda *_: None, "ok", "3."),
    ("Python", fake(sys, "version_info", (3, 14, 0)), "fail", "PYTHON=python3.12"),
    ("packages", lambda *_: None, "ok", "torch 2."),
    ("packages", fake_version("datasets", "4.0.0"), "fail", "datasets 4.0.0, not <6,>=5.2"),
    ("packages", fake_version("rich", None), "fail", "rich missing"),
    ("bad releases", lambda *_: None, "ok", "none"),
    ("bad releases", fake_version("lightning", "2.6.2"), "fail", "lightning 2.6.2 was published by attackers"),
    ("bad releases", fake_version("pytorch-lightning", "2.6.3"), "fail", "pytorch-lightning 2.6.3 was"),
    ("bad releases", fake_version("wandb", "0.28.0"), "fail", "wandb 0.28.0 can deadlock"),
    ("torch.compile", fake("subprocess", "run", times_out), "warn", "not done after 300 s"),
    (
        "torch.compile",
        fake("subprocess", "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr=FAILED_COMPILE)),
        "warn",
        "fails: torch.CppError: no compiler",
    ),
    (
        "torch.compile",
        fake("subprocess", "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="True\n")),
        "ok",
        "works",
    ),
    ("devices", fake_gpus(2), "ok", "H100 (80 GiB), H100 (80 GiB)"),
    ("devices", fake(shutil, "which", lambda _: "/usr/bin/nvidia-smi"), "warn", "finds no GPU"),
    ("precision", fake_gpus(1, bf16=False), "warn", "16-mixed"),
    ("precision", fake_gpus(1), "ok", "bf16-mixed"),
    ("distributed", fake_gpus(2, nccl=False), "fail", "no NCCL"),
    ("distributed", fake(torch.distributed, "is_available", lambda: False), "warn", "--trainer.devices 1"),
    ("distributed", lambda *_: None, "ok", "gloo"),
    ("InfiniBand", fake_gpus(1), "ok", "not needed"),
    ("W&B server", fake_environment(WANDB_MODE="offline"), "warn", "unset WANDB_MODE"),
    ("W&B server", fake_environment(WANDB_MODE="online"), "ok", "no API key is configured"),
    ("W&B server", lambda *_: None, "ok", "no API key is configured"),
    ("W&B server", lambda doctor, patch: patch.setattr(doctor, "wandb_offline_reason", lambda: GONE), "warn", GONE),
    ("W&B server", lambda doctor, patch: patch.setattr(doctor, "wandb_offline_reason", lambda: None), "ok", "confirms"),
    ("W&B offline runs", runs_waiting, "warn", "1 below runs/ are not sent"),
    ("W&B offline runs", lambda *_: None, "ok", "0 below runs/"),
    ("Hugging Face hub", lambda *_: None, "warn", "HF_HUB_OFFLINE is set"),  # as in all tests
    ("disk for runs/", fake(shutil, "disk_usage", lambda _: Usage(0, 0, 2**29)), "fail", "0.5 GiB free"),
    ("disk for data/", fake(shutil, "disk_usage", lambda _: Usage(0, 0, 2**32)), "warn", "4.0 GiB free"),
    ("disk for data/", fake(shutil, "disk_usage", lambda _: Usage(0, 0, 2**40)), "ok", "1024.0 GiB free"),
    ("disk for runs/", fake(os, "access", lambda *_: False), "fail", "cannot be written"),
    ("threads", fake_environment(OMP_NUM_THREADS="4096"), "warn", "OMP_NUM_THREADS=4096 for 1 processes"),
    ("threads", lambda *_: None, "ok", "is not set"),
    ("tokenizers", fake_environment(TOKENIZERS_PARALLELISM="false"), "warn", "unset TOKENIZERS_PARALLELISM"),
    ("tokenizers", fake_environment(TOKENIZERS_PARALLELISM="true"), "ok", "all cores"),
    ("num_workers", lambda doctor, patch: patch.setattr(doctor, "cores", lambda: -1), "warn", ".yaml asks for"),
    ("launcher", fake_environment(RANK="1", WORLD_SIZE="2"), "warn", "unset RANK WORLD_SIZE"),
    ("launcher", lambda *_: None, "ok", "none"),
]


@pytest.mark.parametrize(
    ("name", "fact", "state", "text"), VERDICTS, ids=[f"{name}-{state}" for name, _, state, _ in VERDICTS]
)
def test_verdict(
    name: str, fact: Callable[..., None], state: str, text: str, doctor: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact(doctor, monkeypatch)
    verdict = doctor.examine(doctor.CHECKS[name])
    assert verdict.state == state, verdict
    assert text in f"{verdict.found} {verdict.mend}"
    assert (verdict.mend != "") == (state != "ok")


@pytest.mark.parametrize(("limit", "state"), [(256, "warn"), (1024, "ok"), (-1, "ok")])
def test_open_files(limit: int, state: str, doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert doctor.open_files().state == state


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="there is no /dev/shm")
@pytest.mark.parametrize(("free", "state"), [(2**26, "warn"), (2**33, "ok")])
def test_shared_memory(free: int, state: str, doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    assert doctor.shared_memory().state == state


def test_hub(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.urllib.request, "urlopen", refuses)
    assert "does not answer (refused)" in doctor.hugging_face().found
    monkeypatch.setattr(doctor.urllib.request, "urlopen", lambda *_, **__: SimpleNamespace(close=lambda: None))
    assert doctor.hugging_face().state == "ok"


def test_infiniband(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between machines alone: the GPUs of one do not talk over it."""
    fake_gpus(8)(doctor, monkeypatch)
    assert doctor.infiniband() == ("ok", "not needed", "")
    monkeypatch.setenv("SLURM_NNODES", "2")
    expected = "ok" if any(Path("/sys/class/infiniband").glob("*")) else "warn"
    assert doctor.infiniband().state == expected


@pytest.mark.parametrize(("states", "status"), [(["ok", "warn"], 0), (["ok", "fail", "warn"], 1)])
def test_status(
    states: list[str], status: int, doctor: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    checks = {f"check {s}": (lambda s=s: doctor.Verdict(s, "[a] fact", "a mend")) for s in states}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.main() == status
    out = capsys.readouterr().out
    assert out.count("[a] fact") == out.count("→ a mend") == len(states)


def test_check_that_breaks_fails_and_hides_nothing(doctor: ModuleType) -> None:
    verdict = doctor.examine(lambda: 1 / 0)
    assert (verdict.state, "ZeroDivisionError" in verdict.found) == ("fail", True)


def test_key_is_not_shown(doctor: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(doctor, "wandb_offline_reason", lambda: GONE)
    monkeypatch.delitem(doctor.CHECKS, "torch.compile")
    assert doctor.main() == 0
    assert KEY not in capsys.readouterr().out
