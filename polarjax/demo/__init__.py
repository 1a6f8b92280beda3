"""Everything on the bundled model: convert, sparsify, generate, measure, plot."""

from polarjax.demo.run import DemoOptions, run

__all__ = ["DemoOptions", "run"]
