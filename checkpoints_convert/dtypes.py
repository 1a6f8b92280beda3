"""The dtypes that a weight may have, in the spelling of safetensors."""

from polarjax.storage.dtypes import NUMPY_DTYPES

SPELLINGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""How safetensors spells each of `polarjax.types.DTYPES`."""

DTYPES = {SPELLINGS[name]: dtype for name, dtype in NUMPY_DTYPES.items()}
"""The dtypes, keyed by that spelling."""
