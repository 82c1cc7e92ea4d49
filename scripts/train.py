#!/usr/bin/env python
"""Trains a model and tests its best checkpoint, deterministic and with Monte-Carlo dropout.

python scripts/train.py --config configs/<experiment>.yaml [--config overlay.yaml] [--any.key value]
"""

from collections.abc import Sequence

from thinned.arguments import check_arguments
from thinned.messages import one_message, restart_in_utf8


def main(args: Sequence[str] | None = None) -> None:
    with one_message():
        check_arguments(args)
        from thinned.cli import ThinnedCLI  # now, as it takes seconds

        cli = ThinnedCLI(args)
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
        cli.trainer.test(cli.model, cli.datamodule, ckpt_path=cli.best, verbose=False, weights_only=True)
        cli.print_results()


if __name__ == "__main__":
    restart_in_utf8()
    main()
