"""The doctor's verdicts, each from a fact that is faked, and its exit status."""

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "fedcba98"


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "scripts/doctor.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MASTER_PORT"):
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


GONE = "W&B does not confirm the API key (no answer)"
FAILED_COMPILE = """Traceback (most recent call last):
torch.CppError: no compiler

Set TORCHDYNAMO_VERBOSE=1 for more
"""
VERDICTS = [
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
    ("W&B server", fake_environment(WANDB_MODE="offline"), "warn", "unset WANDB_MODE"),
    ("W&B server", fake_environment(WANDB_MODE="online"), "ok", "no API key is configured"),
    ("W&B server", lambda *_: None, "ok", "no API key is configured"),
    ("W&B server", lambda doctor, patch: patch.setattr(doctor, "wandb_offline_reason", lambda: GONE), "warn", GONE),
    ("W&B server", lambda doctor, patch: patch.setattr(doctor, "wandb_offline_reason", lambda: None), "ok", "confirms"),
    ("W&B offline runs", runs_waiting, "warn", "1 below runs/ are not sent"),
    ("W&B offline runs", lambda *_: None, "ok", "0 below runs/"),
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
    monkeypatch.setattr(doctor, "wandb_offline_reason", lambda: GONE)
    monkeypatch.delitem(doctor.CHECKS, "torch.compile")
    assert doctor.main() == 0
    assert KEY not in capsys.readouterr().out
