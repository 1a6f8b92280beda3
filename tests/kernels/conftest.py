"""Where the GPU compiler writes its reports is settled before the first test runs."""

from tests.kernels import aot  # noqa: F401
