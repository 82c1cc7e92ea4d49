#!/usr/bin/env python
"""Compares runs on the same examples; those that agree in a setting are repetitions with other seeds.

python scripts/compare.py runs/<experiment>/* --by model.net.dropout.mlp [--out comparison.json]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from thinned.evaluation.comparison import compared
from thinned.evaluation.score_tables import print_evaluation
from thinned.files import whole_file
from thinned.messages import one_message, restart_in_utf8


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, tested or evaluated")
    parser.add_argument("--by", help="setting that makes groups, as on the command line; without it, each run is one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all scores there, as JSON")
    given = parser.parse_args(args)
    with one_message():
        comparisons = compared(given.runs, given.by)
        if given.out:
            with whole_file(given.out) as temporary:
                temporary.write_text(json.dumps(comparisons, indent=2) + "\n")
        console = Console()
        for way, comparison in comparisons.items():
            console.rule(way, align="left")
            print_evaluation(console, comparison)


if __name__ == "__main__":
    restart_in_utf8()
    main()
