"""What sparsity costs in quality: perplexity, agreement with the dense model, and tasks of lm-evaluation-harness.

`HarnessLM` needs the package lm-eval (`pip install 'polarjax[eval]'`) and is therefore not in `__all__`.
"""

from typing import TYPE_CHECKING

from polarjax.lazy import lazy_names

if TYPE_CHECKING:
    from polarjax.evaluation.greedy_agreement import agreement
    from polarjax.evaluation.harness import HarnessLM as HarnessLM
    from polarjax.evaluation.text_perplexity import perplexity
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "polarjax.evaluation.greedy_agreement": "agreement",
            "polarjax.evaluation.harness": "HarnessLM",
            "polarjax.evaluation.text_perplexity": "perplexity",
        },
    )

__all__ = ["agreement", "perplexity"]
