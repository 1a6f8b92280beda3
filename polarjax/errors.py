"""Errors a user can meet: few, typed, and one line each.

Every one of them says what is wrong, where, what was got, what was expected and how to mend it. They are
raised at the boundary, where user input enters; the command line prints them and exits with code 2.
"""


class PolarjaxError(ValueError):
    """Bad input to polarjax, told in one line.

    The message reads `where: what; got …, expected …. Mend: …`, each part only if it is given.

    Args:
        what: the fault itself, without a full stop.
        where: the file, field or argument at fault.
        got: the value met.
        expected: what would have been accepted.
        mend: what the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        mend: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.mend = what, where, got, expected, mend
        super().__init__(_one_line(what, where, got, expected, mend))


class UnsupportedConfigError(PolarjaxError):
    """A model configuration that polarjax cannot represent, or a key of one that it does not know."""


class CheckpointError(PolarjaxError):
    """A checkpoint or model directory that is missing, damaged, or not what it says it is."""


class InputError(PolarjaxError):
    """Tokens, text, lengths or options outside what a function accepts."""


class SparsityError(PolarjaxError):
    """Routers, a plan or a density that does not fit the model."""


def _one_line(what: str, where: object, got: object, expected: object, mend: str | None) -> str:
    values = [
        f"{word} {value}" for word, value in (("got", got), ("expected", expected)) if value is not None
    ]
    head = what if where is None else f"{where}: {what}"
    text = f"{head}; {', '.join(values)}" if values else head
    if mend is not None:
        text = f"{text}. Mend: {mend}"
    return " ".join(text.split())
