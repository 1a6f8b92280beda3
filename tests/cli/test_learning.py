"""What the commands that learn print about the plans that they made."""

import pytest

from polarjax.cli.learning import print_neurons
from polarjax.selection.plans import PlanTable

PRINTED = {
    ((4, 4), (6, None), (None, None)): "50% at batch size 1, 88% at batch size 4, and all at larger ones",
    ((4, 8), (6, 8), (7, 8)): "75% at batch size 1, 88% at batch size 4, 94% at batch size 16.",
    ((None, None),) * 3: "all at every batch size.",
}


@pytest.mark.parametrize("neurons", PRINTED, ids=["some", "always", "never"])
def test_tune_says_at_which_batch_sizes_neurons_are_skipped(neurons, capsys):
    sizes = {"num_layers": 2, "num_neurons": 8, "num_groups": 2, "batch_sizes": (1, 4, 16)}
    print_neurons(PlanTable(**sizes, neurons=neurons, recall=((1.0, 1.0),) * 3))
    assert PRINTED[neurons] in capsys.readouterr().out
