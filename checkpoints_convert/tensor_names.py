"""Explains a checkpoint whose tensor names are not those of its family."""

import re
from collections.abc import Collection, Mapping, Sequence

from polarjax.errors import CheckpointError

SHOWN = 10
"""How many names a message lists per kind of fault."""

HEAD = "lm_head.weight"
ROTARY_BUFFERS = (
    r"(^|\.)(rotary_emb|rotary_pos_emb|rotary|rope)\.\w+$|(^|\.)(inv_freq|cos_cached|sin_cached|freqs_cis)$"
)
"""Names of rotary tables, computed from the config, that older versions saved."""

QUANTIZED = (
    r"\.(qweight|qzeros|scales|biases|g_idx|SCB|weight_scale(_inv)?|weight_format|absmax|quant_map)$"
    r"|\.quant_state\."
)
"""Names of the tensors that GPTQ, AWQ, bitsandbytes, fp8 and MLX checkpoints add."""

MERGE_ADAPTER = "merge the adapter into its model first, with merge_and_unload() of peft, and convert that"
_ADAPTER = r"\.lora_|\.base_layer\.|\.modules_to_save\.|^base_model\.model\.|\.(ia3_l|hada_w|oft_r|lokr_w)"
_TASK_HEAD = r"^(score|classifier|qa_outputs|v_head|value_head|reward_head|regression_head)\."
_COMPILED = r"(^|\.)_orig_mod\."
_WRAPPERS = ("_orig_mod.", "module.", "_forward_module.", "_fsdp_wrapped_module.", "model.")


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_tensors(where: object, found: Collection[str], faults: Mapping[str, list[str]]) -> None:
    """Raises `CheckpointError` listing all faults, or naming their cause if the names reveal it.

    Args:
      where: the checkpoint.
      found: the names on disk.
      faults: names by kind of fault; "missing" and "unknown" are among the kinds.
    """
    report = [f"{len(names)} {fault}: {some(names)}" for fault, names in faults.items() if names]
    if not report:
        return
    missing, unknown = faults["missing"], faults["unknown"]
    prefix = _prefix(found, missing, unknown)
    if prefix is not None:
        raise CheckpointError(
            f"the tensors' names contain {prefix!r}, which the model's do not",
            where=where,
            got=some(unknown[:2]),
            hint=f"save the unwrapped model, or remove {prefix!r} from the names: "
            f'{{name.replace("{prefix}", ""): value for name, value in state_dict.items()}}',
        )
    hint = _hint(missing, unknown)
    raise CheckpointError("the tensors do not fit config.json", where=where, got="; ".join(report), hint=hint)


def _prefix(found: Collection[str], missing: Collection[str], unknown: Collection[str]) -> str | None:
    """The prefix that a wrapper added: one whose removal supplies every missing name."""
    if any(re.search(_COMPILED, name) for name in unknown):
        return "_orig_mod."
    if not missing or any(re.search(_ADAPTER, name) for name in unknown):
        return None
    for prefix in _WRAPPERS:
        stripped = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
        if {*missing} - {HEAD} <= stripped and {*missing} & stripped:
            return prefix
    return None


def _hint(missing: list[str], unknown: list[str]) -> str:
    if any(re.search(QUANTIZED, name) for name in unknown):
        return "quantized checkpoints are unsupported; use the original weights"
    if any(re.search(_ADAPTER, name) for name in unknown):
        return f"these are the weights of an adapter (LoRA): {MERGE_ADAPTER}"
    if any(re.search(_TASK_HEAD, name) for name in unknown) and missing in ([], [HEAD]):
        return "this is a classifier or a reward model, which writes no text; use the language model it was made from"
    if missing == [HEAD]:
        return "set tie_word_embeddings to true in config.json if the head shares the embeddings"
    return "check that config.json and the weights belong together and that every shard was downloaded"
