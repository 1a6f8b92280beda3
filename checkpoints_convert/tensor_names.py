"""Explains a checkpoint whose tensor names are not those of its family."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from polarjax.errors import CheckpointError, printable

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
_INFIXES = (
    "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.", "module."
)  # fmt: skip
"""What torch.compile, FSDP, activation checkpointing, DeepSpeed and DataParallel put into names, anywhere."""

_BESIDE = r"^(v_head|value_head|medusa_heads?)\."
_TASK_HEAD = rf"{_BESIDE}|^(score|classifier|qa_outputs|heads?|(?!lm_)\w+_heads?)\."
_LEFT_OVER = r"(^|\.)(_float_tensor|masked_bias|_(cos|sin)_cached|position_ids|causal_mask|_extra_state)$"


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return printable(", ".join(names[:SHOWN]) + more)


def not_needed(unknown: Collection[str], *, complete: bool, head: bool) -> set[str]:
    """Those of the unknown names that cannot change what the model computes; transformers leaves them out too.

    Args:
      unknown: the names.
      complete: whether all tensors of the language model are there.
      head: whether its head is among them; a tied model may be without, and then a classifier looks alike.
    """
    heads = (_TASK_HEAD if head else _BESIDE) if complete else r"(?!)"
    return {name for name in unknown if re.search(_LEFT_OVER, name) or re.search(heads, name)}


def check_tensors(
    where: object,
    found: Collection[str],
    faults: Mapping[str, list[str]],
    canonical: Callable[[str], str] = str,
) -> None:
    """Raises `CheckpointError` listing all faults, or naming their cause if the names reveal it.

    Args:
      where: the checkpoint.
      found: the names on disk.
      faults: names by kind of fault; "missing" and "unknown" are among the kinds.
      canonical: the family's name for a name on disk.
    """
    report = [f"{len(names)} {fault}: {some(names)}" for fault, names in faults.items() if names]
    if not report:
        return
    missing, unknown = faults["missing"], faults["unknown"]
    wrapper = _wrapper(found, missing, unknown, canonical)
    if wrapper is not None:
        raise CheckpointError(
            f"the tensors' names contain {' and '.join(map(repr, wrapper.parts()))}, which a wrapper added",
            where=where,
            got=some(unknown[:2]),
            hint=f"save the unwrapped model, or rename its tensors: {wrapper.renaming()}",
        )
    hint = _hint(missing, unknown)
    raise CheckpointError("the tensors do not fit config.json", where=where, got="; ".join(report), hint=hint)


class _Wrapper(NamedTuple):
    """What wrappers added to the names of tensors.

    Attributes:
      infixes: parts to remove wherever they are, in this order.
      prefix: what the names begin with after that.
      alone: whether names without the prefix are to be left out: they are another model's.
    """

    infixes: tuple[str, ...]
    prefix: str = ""
    alone: bool = False

    def parts(self) -> list[str]:
        """Everything to remove."""
        return [*self.infixes, *([self.prefix] if self.prefix else [])]

    def rename(self, name: str) -> str:
        """The name without them."""
        for infix in self.infixes:
            name = name.replace(infix, "")
        return name.removeprefix(self.prefix)

    def renaming(self) -> str:
        """`rename` of all names, as an expression in Python."""
        calls = "".join(f'.replace("{infix}", "")' for infix in self.infixes)
        calls += f'.removeprefix("{self.prefix}")' if self.prefix else ""
        only = f' if "{self.prefix.partition(".")[0]}." in name' if self.alone else ""
        return f"{{name{calls}: value for name, value in state_dict.items(){only}}}"


def _wrapper(
    found: Collection[str],
    missing: Collection[str],
    unknown: Collection[str],
    canonical: Callable[[str], str],
) -> _Wrapper | None:
    """What wrappers added: its removal supplies every missing name, or infixes whose removal supplies one."""
    if not missing or any(re.search(_ADAPTER, name) for name in unknown):
        return None
    infixes: list[str] = []
    for infix in _INFIXES:
        if any(infix in _Wrapper(tuple(infixes)).rename(name) for name in found):
            infixes.append(infix)
    bare = _Wrapper(tuple(infixes))
    names = [bare.rename(name) for name in found]
    sought = next((name for name in missing if name != HEAD), HEAD)
    prefixes = {
        name[:at]
        for name in names
        for at in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if canonical(name[at:]) == sought
    }
    fitting = []
    for each in (bare._replace(prefix=prefix) for prefix in sorted(prefixes, key=len)):
        supplied = {canonical(each.rename(name)) for name in found}
        if {*missing} - {HEAD} <= supplied:
            fitting.append((HEAD in missing and HEAD not in supplied, each))
    if not fitting:
        supplied = {canonical(name) for name in names}
        return bare if infixes and {*missing} & supplied else None
    _, best = min(fitting, key=lambda pair: pair[0])  # of equals the first
    others = {canonical(best.rename(name)) for name in unknown} - {*missing, HEAD}
    return best._replace(alone=bool(best.prefix and others and HEAD not in found))


def _hint(missing: list[str], unknown: list[str]) -> str:
    if any(re.search(QUANTIZED, name) for name in unknown):
        return "quantized checkpoints are unsupported; use the original weights"
    if any(re.search(_ADAPTER, name) for name in unknown):
        return f"these are the weights of an adapter (LoRA): {MERGE_ADAPTER}"
    if any(re.search(_TASK_HEAD, name) for name in unknown) and missing in ([], [HEAD]):
        return "this is a classifier or a reward model, which writes no text; use the language model it was made from"
    if missing == [HEAD]:
        return "set tie_word_embeddings to true in config.json if the head shares the embeddings"
    if unknown and not missing:
        return "use the config.json of these weights: with this one, transformers leaves those tensors out"
    return "check that config.json and the weights belong together and that every shard was downloaded"
