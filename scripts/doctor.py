#!/usr/bin/env python
"""Says what this machine has, and which known traps apply here, each with its mend.

The exit status is 1 if something is broken, else 0.

python scripts/doctor.py
"""

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import huggingface_hub.constants
import torch
import wandb
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from thinned.runs.cpu_precision import SLOW, bf16_slowdown
from thinned.runs.wandb_server import wandb_offline_reason

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
COMPILED = """
import torch
print(torch.compile(lambda x: (x.sin() + 1).sum())(torch.ones(8)).isfinite().item())
"""
STOLEN = ("was published by attackers", "take this machine's secrets for stolen; pip install 'lightning>=2.6.5'")
BAD_RELEASES = [  # package, releases, why, mend
    ("lightning", ">=2.6.2,<=2.6.3", *STOLEN),
    ("pytorch-lightning", ">=2.6.2,<=2.6.3", *STOLEN),
    ("wandb", ">=0.25.1,<0.28.1", "can deadlock forked data loader workers", "pip install 'wandb>=0.28.1'"),
]


class Verdict(NamedTuple):
    """Of a check: fail is what breaks a run, warn what can slow it down or surprise."""

    state: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Those that this process may use, which in a container are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python() -> Verdict:
    found = f"{sys.version.split()[0]} at {sys.prefix}"
    if (3, 11) <= sys.version_info < (3, 14):
        return Verdict("ok", found)
    return Verdict("fail", found, "Python 3.11 to 3.13: make clean train PYTHON=python3.12")


def packages() -> Verdict:
    required = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"])
    found = {r: version(r.name) for r in required}
    wrong = [f"{r.name} {v or 'missing'}, not {r.specifier}" for r, v in found.items() if not v or v not in r.specifier]
    if wrong:
        return Verdict("fail", "; ".join(wrong), "pip install -c constraints.txt -e .")
    return Verdict("ok", ", ".join(f"{r.name} {v}" for r, v in found.items()))


def bad_releases() -> Verdict:
    for name, releases, why, mend in BAD_RELEASES:
        found = version(name)
        if found and found in SpecifierSet(releases):
            return Verdict("fail", f"{name} {found} {why}", mend)
    return Verdict("ok", "none")


def compilation() -> Verdict:
    """A two-line function, in a process of its own."""
    mend = "leave out model.compile, or "
    mend += "move to a path without spaces" if " " in sys.prefix else "install a C++ compiler (for CUDA: triton)"
    command = [sys.executable, "-c", COMPILED]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return Verdict("warn", "torch.compile is not done after 300 s", mend)
    if done.returncode or done.stdout.strip() != "True":
        said = done.stderr.strip().splitlines() or ["no output"]
        cause = [line for line in said if re.match(r"[\w.]+Error: ", line)] or said  # which advice follows
        return Verdict("warn", f"torch.compile fails: {cause[-1][:200]}", mend)
    return Verdict("ok", "torch.compile works (on the net alone: torch 2.12 and later cannot compile self.log)")


# Devices


def devices() -> Verdict:
    threads = f"CPU with {torch.get_num_threads()} threads on {cores()} cores"
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus)
        return Verdict("ok", f"CUDA {torch.version.cuda}: {names}; {threads}")
    if shutil.which("nvidia-smi"):
        mend = "install torch for CUDA, or a driver that fits it: compare nvidia-smi with torch.version.cuda"
        return Verdict("warn", f"torch {torch.__version__} finds no GPU, though there is nvidia-smi; {threads}", mend)
    return Verdict("ok", f"MPS; {threads}" if torch.backends.mps.is_available() else threads)


def precision() -> Verdict:
    if not torch.cuda.is_available():
        cpu, slowdown = torch.backends.cpu.get_cpu_capability(), bf16_slowdown()
        if slowdown > SLOW:
            return Verdict("ok", f"CPU with {cpu}: 32; a product in bf16 takes {slowdown:.1f} times as long")
        return Verdict("ok", f"CPU with {cpu}: 32, bf16-mixed")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Verdict("warn", "no bf16 on this GPU", "--trainer.precision 16-mixed, without a fused optimiser")
    return Verdict("ok", f"32, bf16-mixed, 16-mixed; matrix products in 32: {torch.get_float32_matmul_precision()}")


def distributed() -> Verdict:
    if not torch.distributed.is_available():
        return Verdict("warn", "torch was built without torch.distributed", "one process alone: --trainer.devices 1")
    backends = [b for b in ("gloo", "nccl", "mpi") if getattr(torch.distributed, f"is_{b}_available")()]
    if torch.cuda.device_count() > 1 and "nccl" not in backends:
        return Verdict("fail", f"several GPUs, but no NCCL: {', '.join(backends)}", "install torch for CUDA on Linux")
    return Verdict("ok", ", ".join(backends))


def infiniband() -> Verdict:
    several = int(os.environ.get("SLURM_NNODES") or 1) > 1  # the GPUs of one machine do not talk over it
    if several and not any(Path("/sys/class/infiniband").glob("*")):
        mend = "if NCCL hangs at the start: NCCL_IB_DISABLE=1, NCCL_SOCKET_IFNAME=..., NCCL_DEBUG=INFO to see why"
        return Verdict("warn", "none, so NCCL talks over sockets between machines", mend)
    return Verdict("ok", "not needed" if not several else "found")


# Services


def wandb_server() -> Verdict:
    if (mode := os.environ.get("WANDB_MODE")) and mode != "online":
        return Verdict("warn", f"WANDB_MODE={mode} decides, whatever key there is", "unset WANDB_MODE")
    reason = wandb_offline_reason()
    if reason is None:
        return Verdict("ok", f"{wandb.setup().settings.base_url} confirms the API key")
    if "no API key" in reason:
        return Verdict("ok", "no API key is configured: runs are logged offline")
    return Verdict("warn", f"{reason}: runs are logged offline", "wandb login --relogin, WANDB_BASE_URL, or a proxy")


def offline_runs() -> Verdict:
    logs = [log for log in Path("runs").glob("*/*/wandb/offline-run-*/*.wandb") if not Path(f"{log}.synced").exists()]
    if logs and wandb.setup().settings.api_key:
        return Verdict("warn", f"{len(logs)} below runs/ are not sent", "wandb sync runs/*/*/wandb/offline-run-*")
    return Verdict("ok", f"{len(logs)} below runs/")


def hugging_face() -> Verdict:
    constants = huggingface_hub.constants
    cache = f"cache {constants.HF_HUB_CACHE}, token {'found' if huggingface_hub.get_token() else 'none'}"
    if constants.HF_HUB_OFFLINE:
        return Verdict("warn", f"HF_HUB_OFFLINE is set; {cache}", "unset HF_HUB_OFFLINE, where a dataset is not cached")
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        mend = "data in a folder, or cached, will do; HF_ENDPOINT names a mirror"
        return Verdict("warn", f"{constants.ENDPOINT} does not answer ({error}); {cache}", mend)
    return Verdict("ok", f"{constants.ENDPOINT} answers; {cache}")


# Limits


def room(name: str) -> Verdict:
    """Of a folder, or where it would be made."""
    folder = next(path for path in (Path(name).absolute(), *Path(name).absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Verdict("fail", f"{folder} cannot be written", "another folder: --runs_dir, --data.cache_dir")
    if free < 1:
        return Verdict("fail", found, "make room, or another disk: --runs_dir, --data.cache_dir")
    return Verdict("warn", found, "checkpoints and tokens may not fit") if free < 10 else Verdict("ok", found)


def shared_memory() -> Verdict:
    if not Path("/dev/shm").exists():
        return Verdict("ok", "not a thing here")
    size = shutil.disk_usage("/dev/shm").free / GIB
    if size < 1:
        mend = "docker run --shm-size 8g, or --data.num_workers 0"
        return Verdict("warn", f"{size:.2f} GiB free, which data loader workers may use up", mend)
    return Verdict("ok", f"{size:.1f} GiB free")


def open_files() -> Verdict:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < 1024:
        return Verdict("warn", f"{limit}, which workers and shards may use up", "ulimit -n 4096")
    return Verdict("ok", f"limit {limit}")


# Settings


def threads() -> Verdict:
    given, ranks = os.environ.get("OMP_NUM_THREADS"), max(1, torch.cuda.device_count())
    if given and given.isdigit() and int(given) * ranks > cores():
        found = f"OMP_NUM_THREADS={given} for {ranks} processes on {cores()} cores"
        return Verdict("warn", found, f"OMP_NUM_THREADS={max(1, cores() // ranks)}")
    if given == "1" and cores() > 1 and not torch.cuda.is_available():
        return Verdict("warn", f"OMP_NUM_THREADS=1 leaves {cores() - 1} cores idle", "unset OMP_NUM_THREADS")
    return Verdict("ok", f"OMP_NUM_THREADS={given}" if given else "OMP_NUM_THREADS is not set")


def tokenizers_parallelism() -> Verdict:
    given = os.environ.get("TOKENIZERS_PARALLELISM")
    if given and given.lower() in ("0", "false", "no", "off", "n", "f"):
        return Verdict("warn", f"TOKENIZERS_PARALLELISM={given}: one thread tokenises", "unset TOKENIZERS_PARALLELISM")
    return Verdict("ok", "all cores tokenise")


def workers() -> Verdict:
    asked = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        data = (yaml.safe_load(path.read_text("utf-8")) or {}).get("data") or {}
        asked[path.name] = (data.get("init_args") or {}).get("num_workers", 0)
    many = [f"{name} asks for {number}" for name, number in asked.items() if number > cores()]
    if many:
        return Verdict("warn", f"{', '.join(many)} on {cores()} cores", f"--data.num_workers {cores()}")
    return Verdict("ok", "no config asks for more workers than there are cores")


def launcher_variables() -> Verdict:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    if left := [name for name in names if name in os.environ]:
        found = f"{', '.join(left)} set outside of a launcher: a run waits for ranks that nobody starts"
        return Verdict("warn", found, f"unset {' '.join(left)}")
    return Verdict("ok", "none left over")


CHECKS: dict[str, Callable[[], Verdict]] = {
    "Python": python,
    "packages": packages,
    "bad releases": bad_releases,
    "torch.compile": compilation,
    "devices": devices,
    "precision": precision,
    "distributed": distributed,
    "InfiniBand": infiniband,
    "W&B server": wandb_server,
    "W&B offline runs": offline_runs,
    "Hugging Face hub": hugging_face,
    "disk for runs/": lambda: room("runs"),
    "disk for data/": lambda: room("data"),
    "shared memory": shared_memory,
    "open files": open_files,
    "threads": threads,
    "tokenizers": tokenizers_parallelism,
    "num_workers": workers,
    "launcher": launcher_variables,
}


def examine(check: Callable[[], Verdict]) -> Verdict:
    try:
        return check()
    except Exception as error:  # what cannot be found out must not hide the rest
        return Verdict("fail", f"{type(error).__name__}: {error}", "a check that breaks is a bug: please report it")


def main() -> int:
    table = Table("check", "", "found", show_lines=False)
    verdicts = {name: examine(check) for name, check in CHECKS.items()}
    for name, (state, found, mend) in verdicts.items():
        text = f"{found}\n→ {mend}" if mend else found
        table.add_row(name, f"[{STYLES[state]}]{state}[/]", text.replace("[", r"\["))
    Console().print(table)
    return int(any(verdict.state == "fail" for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
