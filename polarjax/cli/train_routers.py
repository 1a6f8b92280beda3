"""`polarjax train-routers`: trains routers on recorded activations, and refines those of heads."""

from typing import Any, cast

from polarjax.cli import learning
from polarjax.cli.inputs import random_key
from polarjax.sparsity.options import CalibrateOptions, DenseAttention


def train_routers(
    folder: learning.Folder,
    activations: learning.Recorded,
    head_density: learning.HeadDensity = 0.5,
    learning_rate: learning.LearningRate = learning.DEFAULTS.learning_rate,
    batch: learning.Batch = learning.DEFAULTS.neuron_batch,
    epochs: learning.Epochs = learning.DEFAULTS.max_epochs,
    head_objective: learning.Objective = None,
    refine_tokens: learning.RefineTokens = None,
    dense_attention: learning.DenseAttention = "first",
    budgets: learning.Budgets = "uniform",
    published: learning.Published = False,
    seed: learning.Seed = 0,
) -> dict[str, Any]:
    """Train the routers of a model directory; replaces existing routers and removes their plans."""
    from polarjax import sparsity
    from polarjax.checkpoint.learned import write_routers
    from polarjax.sparsity.calibration import dense_layer
    from polarjax.sparsity.checks import check_budgets
    from polarjax.sparsity.pipeline import StageKeys
    from polarjax.sparsity.refinement import refine

    keys = StageKeys.of(random_key(seed))
    training = learning.train_options(learning_rate, batch, epochs, head_objective, published)
    chosen = check_budgets(budgets, "--budgets")
    refinement = learning.refine_options(refine_tokens, published)
    calibration = CalibrateOptions(dense_attention=cast(DenseAttention, dense_attention))
    bundle, recorded = learning.open_for(folder, activations)
    if refinement.tokens != 0:
        recorded.windows_of("train")  # which is refused before the work, not after it
    density: dict[str, Any] = {"head_density": head_density}
    routers, report = sparsity.train_routers(
        recorded, bundle.model.config, keys.train, options=training, **density
    )
    heads = {"dense_layers": (dense_layer(recorded, calibration),), "budgets": chosen}
    routers, refined = refine(
        bundle.model, routers, recorded, keys.refine, options=refinement, **heads, **density
    )
    write_routers(folder, routers)
    learning.print_training(report)
    learning.print_refinement(refined)
    print(f"\nRouters are in {folder}. Next: polarjax calibrate {folder} --activations {activations}")
    return report.to_json() | {"refinement": None if refined is None else refined.to_json()}
