"""The errors a user can see: few, typed, and one line each.

Each says what is wrong and where, what was given, what was expected, and how to fix it. They are raised at the boundary,
where user input enters; the command line prints them and exits with code 2.
"""

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # what JAX says on GPUs and on CPUs


class PolarjaxError(ValueError):
    """Bad input to polarjax, described in one line.

    The message reads `where: what; got …, expected …. Hint: …`, without the parts that are None.

    Args:
        what: what is wrong, without a final period.
        where: the file, field or argument at fault.
        got: the value received.
        expected: what would have been accepted.
        hint: how to fix it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.hint = what, where, got, expected, hint
        super().__init__(_one_line(what, where, got, expected, hint))


class UnsupportedConfigError(PolarjaxError):
    """A model configuration that polarjax cannot represent, or one with an unknown key."""


class CheckpointError(PolarjaxError):
    """A checkpoint or model directory that is missing, damaged, or not what it claims to be."""


class InputError(PolarjaxError):
    """Tokens, text, lengths or options outside what a function accepts."""


class SparsityError(PolarjaxError):
    """Routers, a plan or a density that does not fit the model."""


def _one_line(what: str, where: object, got: object, expected: object, hint: str | None) -> str:
    values = [
        f"{word} {value}" for word, value in (("got", got), ("expected", expected)) if value is not None
    ]
    head = what if where is None else f"{where}: {what}"
    text = f"{head}; {', '.join(values)}" if values else head
    if hint is not None:
        text = f"{text}. Hint: {hint}"
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The text with control and formatting characters, such as a terminal's escapes, written as `\\x1b`."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )


def not_finite(where: object, got: str | None = None) -> InputError:
    """The error for a model whose logits are NaN or infinite; `got` says how many of what."""
    hint = "compute in float32 (--dtype float32), or convert an undamaged checkpoint"
    return InputError("the model computes NaN or infinity", where=where, got=got, hint=hint)


def read_hint(error: OSError, otherwise: str) -> str:
    """How to fix a file or folder that can't be read."""
    denied = isinstance(error, PermissionError)
    return "ask for permission to read it, or run as a user who may" if denied else otherwise


def ran_out(error: BaseException) -> bool:
    """Whether this is JAX's error for a failed allocation."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
