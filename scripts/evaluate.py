#!/usr/bin/env python
"""Evaluates checkpoints: can the uncertainty be trusted? It compares ways to predict, by scores with intervals.

python scripts/evaluate.py --ckpt_path runs/<experiment>/<run id> [runs/<experiment>/<another> ...]
[--sets shifts.yaml] [--data.predict_split val] [--mc_dropout.num_samples 200]
[--mc_dropout.coverage 0.95]

Beside the deterministic network and Monte-Carlo dropout, it evaluates both at the temperature that fits half of the
validation split, and several checkpoints as ensembles. The other half calibrates prediction sets of 90 % coverage.
After the test it evaluates on the sets of a yaml: shifted ones by severity, and foreign ones to tell from the test. A
killed evaluation resumes with --resume, and skips the sets that it has already predicted.
"""

from collections.abc import Sequence

from thinned.messages import one_message, restart_in_utf8
from thinned.quick_imports import quick_imports


def main(args: Sequence[str] | None = None) -> None:
    with one_message():
        with quick_imports():
            from thinned.cli import ThinnedCLI
            from thinned.evaluation.sets import evaluate_sets
            from thinned.runs.checkpoint_io import checkpoint_arguments

        checkpoints, (config, content, *options) = checkpoint_arguments(args, with_logger=True)
        cli = ThinnedCLI([config, content, "--mc_dropout.coverage", "0.9", *options], checkpoints, purpose="evaluate")
        cli.trainer.predict(cli.model, cli.datamodule, return_predictions=False)
        predictor = cli.config_init.mc_dropout
        left_out = evaluate_sets(cli.trainer, cli.model, predictor, cli.sets, cli.data_of)
        cli.print_results()
        if left_out and cli.trainer.is_global_zero:  # others end in peace: Lightning kills this process if one fails
            raise ValueError(f"Expected sets that this network can predict, but left out {'; '.join(left_out)}")


if __name__ == "__main__":
    restart_in_utf8()
    main()
