#!/usr/bin/env python
"""Trains a model and tests its best checkpoint, deterministic and with Monte-Carlo dropout.

python scripts/train.py --config configs/<experiment>.yaml [--config overlay.yaml] [--any.key value]
"""

from collections.abc import Sequence

from thinned.arguments import check_arguments
from thinned.messages import one_message, restart_in_utf8
from thinned.quick_imports import quick_imports


def main(args: Sequence[str] | None = None) -> None:
    with one_message():
        check_arguments(args)
        with quick_imports():
            from thinned.cli import ThinnedCLI
        cli = ThinnedCLI(args)
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
        cli.trainer.test(cli.model, cli.datamodule, ckpt_path=cli.best, verbose=False, weights_only=True)
        cli.print_results()


if __name__ == "__main__":
    restart_in_utf8()
    main()
