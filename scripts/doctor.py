#!/usr/bin/env python
"""Says which known traps of this project apply on this machine, and how to mend each.

The exit status is 1 if something is broken, else 0.

python scripts/doctor.py
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import wandb
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from thinned.runs.logger_settings import wandb_offline_reason

ROOT = Path(__file__).resolve().parents[1]
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
    """Holds the result of a check: fail breaks a run, warn can slow it down or surprise."""

    state: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
    """Compiles a two-line function, in its own process."""
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
        cause = [line for line in said if re.match(r"[\w.]+Error: ", line)] or said  # advice follows it
        return Verdict("warn", f"torch.compile fails: {cause[-1][:200]}", mend)
    return Verdict("ok", "torch.compile works (on the net alone: torch 2.12 and later cannot compile self.log)")


def wandb_server() -> Verdict:
    if (mode := os.environ.get("WANDB_MODE")) and mode != "online":
        return Verdict("warn", f"WANDB_MODE={mode} overrides any API key", "unset WANDB_MODE")
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


def launcher_variables() -> Verdict:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    if left := [name for name in names if name in os.environ]:
        found = f"{', '.join(left)} set outside of a launcher: a run waits for ranks that nobody starts"
        return Verdict("warn", found, f"unset {' '.join(left)}")
    return Verdict("ok", "none left over")


CHECKS: dict[str, Callable[[], Verdict]] = {
    "packages": packages,
    "bad releases": bad_releases,
    "torch.compile": compilation,
    "W&B server": wandb_server,
    "W&B offline runs": offline_runs,
    "launcher": launcher_variables,
}


def examine(check: Callable[[], Verdict]) -> Verdict:
    try:
        return check()
    except Exception as error:  # a check that breaks must not hide the others
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
