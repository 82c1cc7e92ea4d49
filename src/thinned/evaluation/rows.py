"""Makes rows of predictions: one per example, or per token of a text, with the columns of each way to predict.

Columns that ways share: index (place in the split) and target; of examples also source (a file, or a stored split and
its row, if the data module tells); of tokens also position (tokens of context, 1 to T).
Of each way, after its name and an underscore (`mc_dropout_nll`): prediction, confidence and predictive_entropy, with
targets nll, correct and rank (1 if the target is the most probable); of examples probs (K numbers) and brier.
A way that streams several distributions also has expected_entropy and mutual_information, with targets nll_at (the nll
of the mean of the first 1, 2, 4, ... of them), and of examples variation_ratio and std, of the predicted class's
probability. An ensemble has mutual_information_between (its members) instead of nll_at, and of examples
variance_between and variance_within members, of the predicted class's probability. Entropies and nll are in nats. An
evaluation has the size of each conformal set (`thr_size`, `aps_size`, `raps_size`), and whether it contains the target
(`thr_covered`, ...).

One row has the columns of all ways, so that two ways are compared on the same example, and a column is read alone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from thinned.evaluation.batch import Batch
from thinned.evaluation.prediction_sets import PredictionSets
from thinned.evaluation.ways import Way, learning_order
from thinned.uncertainty.statistics import TokenStatistics

ROW_FORMAT = 3  # in the metadata of the files

Rows = dict[str, Tensor]


@torch.no_grad()
def predicted_rows(
    batch: Batch, trained: nn.Module, ways: Sequence[Way], sets: PredictionSets | None = None
) -> tuple[Rows, Rows]:
    """Returns the rows of a batch, and of text those of its sequences: index, tokens, and what each way says of them.

    An example's row is at its `index`, and a token's at the `index` of its sequence * T + position.
    """
    parts = [_rows(part, ways, sets) for part in batch.parts(trained, len(learning_order(ways)))]
    rows, sequences = ({name: torch.cat([p[i][name] for p in parts]) for name in parts[0][i]} for i in (0, 1))
    return rows, sequences


def _rows(batch: Batch, ways: Sequence[Way], sets: PredictionSets | None) -> tuple[Rows, Rows]:
    rows: Rows = {"index": batch.index}
    sequences: Rows = {}
    if batch.counted is not None:
        sequence, position = batch.counted.nonzero(as_tuple=True)
        rows = {"index": batch.index[sequence] * batch.counted.shape[1] + position, "position": position + 1}
        sequences = {"index": batch.index, "tokens": batch.counted.sum(1)}
    if batch.targets is not None:
        rows["target"] = batch.target
    for way in ways:
        statistics = batch.statistics(way)
        columns = statistics.columns()
        if isinstance(statistics, TokenStatistics):
            sequences |= {f"{way.name}_{key}": column for key, column in statistics.sequences(columns).items()}
        elif sets is not None:
            columns |= sets.columns(way, statistics.mean, batch.targets, batch.index)
        rows |= {f"{way.name}_{key}": column for key, column in columns.items()}
    return rows, sequences


def blocks_of(rows: Mapping[str, Tensor]) -> Tensor | None:
    """Returns for each token its block of consecutive sequences, (N,) int64; None for examples, which are independent.

    A block has B^(1/3) of B sequences (Hall, Horowitz and Jing 1995): tokens close to each other are alike.
    """
    if "position" not in rows:
        return None
    first = rows["index"] - rows["position"] + 1  # of the sequence
    _, sequence = torch.unique(first, return_inverse=True)
    return sequence // max(1, round((int(sequence.max()) + 1) ** (1 / 3)))
