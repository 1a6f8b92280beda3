"""The whole way on the bundled model: convert, sparsify, generate, measure, draw."""

from polarjax.demo.run import DemoOptions, run

__all__ = ["DemoOptions", "run"]
