"""What the names of a checkpoint's tensors say about it, where they are not those of its family."""

import re
from collections.abc import Collection, Mapping, Sequence

from polarjax.errors import CheckpointError

SHOWN = 10
"""How many names a report lists of each kind of fault."""

HEAD = "lm_head.weight"
ROTARY_BUFFERS = (
    r"(^|\.)(rotary_emb|rotary_pos_emb|rotary|rope)\.\w+$|(^|\.)(inv_freq|cos_cached|sin_cached|freqs_cis)$"
)
"""Names of the tables that rotary embeddings compute from the config and that older versions saved."""

QUANTISED = (
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
    """Raises `CheckpointError` with one report of all faults, or with what the names say is behind them.

    Args:
      where: the checkpoint.
      found: the names on disk.
      faults: names by kind of fault; "missing" and "unknown" are among the kinds.
    """
    told = [f"{len(names)} {fault}: {some(names)}" for fault, names in faults.items() if names]
    if not told:
        return
    missing, unknown = faults["missing"], faults["unknown"]
    prefix = _prefix(found, missing, unknown)
    if prefix is not None:
        raise CheckpointError(
            f"the tensors' names have {prefix!r} in them, which the model's have not",
            where=where,
            got=some(unknown[:2]),
            hint=f"save the model that is inside the wrapper, or take {prefix!r} out of the names: "
            f'{{name.replace("{prefix}", ""): value for name, value in state_dict.items()}}',
        )
    hint = _hint(missing, unknown)
    raise CheckpointError("the tensors do not fit config.json", where=where, got="; ".join(told), hint=hint)


def _prefix(found: Collection[str], missing: Collection[str], unknown: Collection[str]) -> str | None:
    """What a wrapper put into the names; without it, nothing that is missing is missing."""
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
    if any(re.search(QUANTISED, name) for name in unknown):
        return "quantised checkpoints are unsupported; take the original weights"
    if any(re.search(_ADAPTER, name) for name in unknown):
        return f"these are the weights of an adapter (LoRA): {MERGE_ADAPTER}"
    if any(re.search(_TASK_HEAD, name) for name in unknown) and missing in ([], [HEAD]):
        return "this is a classifier or a reward model, which writes no text; take the language model it was made of"
    if missing == [HEAD]:
        return "set tie_word_embeddings to true in config.json if the head shares the embeddings"
    return "check that config.json and the weights belong together and that every shard was downloaded"
