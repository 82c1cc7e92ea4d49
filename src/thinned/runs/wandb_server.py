"""Whether Weights & Biases can be reached, and how long a run waits for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import wandb
from lightning.pytorch.utilities import rank_zero_info

FINISH_SECONDS = 120  # for uploads at the end of a run; `wandb sync --no-skip-online` sends what is left then


def wandb_offline_reason() -> str | None:
    """Says why runs are to be logged offline, after 10 seconds at most; None where the server takes the API key."""
    # wandb's own default is to wait for ever. Read when its service starts.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
    try:
        return None if wandb.login(prompt=False) else "no API key is configured"
    except wandb.errors.AuthenticationError as error:
        cause = str(error).rpartition(": ")[2].rstrip(".")
        return f"{wandb.setup().settings.base_url} does not confirm the API key ({cause})"


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Has a run go on without what W&B asks its server about before it takes it, such as a table."""
    try:
        yield
    except Exception as error:  # whatever a server does wrong
        rank_zero_info(f"W&B: {' '.join(str(error).split())}; the run goes on without {what}.")
