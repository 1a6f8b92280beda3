"""What sparsity costs in quality: perplexity and agreement, one by one or in a sweep, and lm-evaluation-harness.

`HarnessLM` needs the package lm-eval (`pip install 'polarjax[eval]'`) and is therefore not in `__all__`.
"""

from typing import TYPE_CHECKING

from polarjax.lazy import lazy_names

if TYPE_CHECKING:
    from polarjax.evaluation.fixed_scores import static_selector
    from polarjax.evaluation.greedy_agreement import agreement
    from polarjax.evaluation.harness import HarnessLM as HarnessLM
    from polarjax.evaluation.parting import GreedyOptions
    from polarjax.evaluation.quality_sweep import sweep
    from polarjax.evaluation.report import Report
    from polarjax.evaluation.text_perplexity import perplexity
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "polarjax.evaluation.fixed_scores": "static_selector",
            "polarjax.evaluation.greedy_agreement": "agreement",
            "polarjax.evaluation.harness": "HarnessLM",
            "polarjax.evaluation.parting": "GreedyOptions",
            "polarjax.evaluation.report": "Report",
            "polarjax.evaluation.quality_sweep": "sweep",
            "polarjax.evaluation.text_perplexity": "perplexity",
        },
    )

__all__ = ["GreedyOptions", "Report", "agreement", "perplexity", "static_selector", "sweep"]
