"""`polarjax train-routers`: trains routers on recorded activations."""

from typing import Any

from polarjax.cli import learning
from polarjax.cli.inputs import random_key


def train_routers(
    folder: learning.Folder,
    activations: learning.Recorded,
    head_density: learning.HeadDensity = 0.5,
    learning_rate: learning.LearningRate = learning.DEFAULTS.learning_rate,
    batch: learning.Batch = learning.DEFAULTS.neuron_batch,
    epochs: learning.Epochs = learning.DEFAULTS.max_epochs,
    head_objective: learning.Objective = None,
    seed: learning.Seed = 0,
) -> dict[str, Any]:
    """Train the routers of a model directory; replaces existing routers and removes their plans."""
    from polarjax import sparsity
    from polarjax.checkpoint.learned import write_routers

    key = random_key(seed)
    options = learning.train_options(learning_rate, batch, epochs, head_objective)
    bundle, recorded = learning.open_for(folder, activations)
    routers, report = sparsity.train_routers(
        recorded, bundle.model.config, key, head_density=head_density, options=options
    )
    write_routers(folder, routers)
    learning.print_training(report)
    print(f"\nRouters are in {folder}. Next: polarjax calibrate {folder} --activations {activations}")
    return report.to_json()
