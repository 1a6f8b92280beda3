"""The families that can be converted, by the model_type of their config.json."""

from checkpoints_convert.families.llama import LLAMA, MINISTRAL, MISTRAL, QWEN2, QWEN3, SPARSELLAMA
from checkpoints_convert.families.opt import OPT
from checkpoints_convert.rules import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (OPT, LLAMA, SPARSELLAMA, MISTRAL, MINISTRAL, QWEN2, QWEN3)
}
