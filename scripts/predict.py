#!/usr/bin/env python
"""Predicts with Monte-Carlo dropout from a checkpoint alone, which holds net, data and settings.

python scripts/predict.py --ckpt_path runs/<experiment>/<run id>/checkpoints/best.ckpt
[--data.path other] [--data.predict_split val] [--mc_dropout.num_samples 200]
"""

from collections.abc import Sequence

from thinned.messages import one_message, restart_in_utf8
from thinned.quick_imports import quick_imports


def main(args: Sequence[str] | None = None) -> None:
    with one_message():
        with quick_imports():
            from thinned.cli import ThinnedCLI
            from thinned.runs.checkpoint_io import checkpoint_arguments

        checkpoints, arguments = checkpoint_arguments(args)
        if len(checkpoints) > 1:
            got = f"{len(checkpoints)}: scripts/evaluate.py takes several"
            raise ValueError(f"Expected --ckpt_path with one checkpoint, but got {got}")
        cli = ThinnedCLI(arguments, checkpoints, purpose="predict")
        cli.trainer.predict(cli.model, cli.datamodule, return_predictions=False)
        cli.print_results()


if __name__ == "__main__":
    restart_in_utf8()
    main()
