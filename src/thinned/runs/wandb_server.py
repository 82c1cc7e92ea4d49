"""Whether Weights & Biases can be reached, and how long a run waits for it."""

import os

import wandb

FINISH_SECONDS = 120  # for uploads at the end of a run; `wandb sync --no-skip-online` sends what is left then


def wandb_offline_reason() -> str | None:
    """Returns, after 10 seconds at most, why to log offline; None if the server accepts the API key."""
    # wandb reads it when its service starts, and by default waits for ever.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
    try:
        return None if wandb.login(prompt=False) else "no API key is configured"
    except wandb.errors.AuthenticationError as error:
        cause = str(error).rpartition(": ")[2].rstrip(".")
        return f"{wandb.setup().settings.base_url} does not confirm the API key ({cause})"
