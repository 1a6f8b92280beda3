"""`polarjax calibrate`: finds how many neurons each layer needs at each batch size."""

from typing import Any

from polarjax.cli import learning
from polarjax.cli.inputs import random_key
from polarjax.errors import SparsityError


def calibrate(
    folder: learning.Folder,
    activations: learning.Recorded,
    head_density: learning.HeadDensity = 0.5,
    target_recall: learning.Recall = 0.99,
    max_batch: learning.MaxBatch = learning.LARGEST_BATCH,
    dense_attention: learning.DenseAttention = "first",
    budgets: learning.Budgets = "uniform",
    shards: learning.Shards = 1,
    attention: learning.Attention = "groups",
    seed: learning.Seed = 0,
) -> dict[str, Any]:
    """Make plans for a model directory that has routers; replaces existing plans."""
    from polarjax import sparsity
    from polarjax.checkpoint.learned import write_plans
    from polarjax.sparsity.budgets import with_budgets
    from polarjax.sparsity.calibration import measure_recall
    from polarjax.sparsity.checks import check_budgets
    from polarjax.sparsity.pipeline import StageKeys

    keys = StageKeys.of(random_key(seed))
    chosen = check_budgets(budgets, "--budgets")
    options = learning.calibrate_options(target_recall, max_batch, dense_attention, shards, attention)
    bundle, recorded = learning.open_for(folder, activations, routers=True)
    if bundle.routers is None:
        hint = f"run polarjax train-routers {folder} --activations {activations}"
        raise SparsityError("the model has no routers yet", where=folder, hint=hint)
    if chosen == "calibrated":
        recorded.windows_of("validation", at_least=1)  # which is refused before the work, not after it
    plans = sparsity.calibrate(
        recorded,
        bundle.routers,
        bundle.model.config,
        key=keys.calibrate,
        head_density=head_density,
        options=options,
    )
    if chosen == "calibrated":
        plans = with_budgets(bundle.model, bundle.routers, recorded, plans)
    recall = measure_recall(recorded, bundle.routers, plans, key=keys.measure, options=options)
    write_plans(folder, plans)
    learning.print_plans(plans, recall)
    print(f"\nPlans are in {folder}. Next: polarjax generate {folder} --prompt TEXT")
    return {"plans": plans.to_json(), "recall": recall}
