"""Counts and times of a server, in the text format that Prometheus reads."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """How many values are at most each of `SECONDS`."""

    def __init__(self) -> None:
        self._counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect.bisect_left(SECONDS, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self._counts)

    def lines(self, name: str) -> Iterator[str]:
        """Its samples."""
        below = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {below}"


class Metrics:
    """What a server counts. Each value is changed by one thread at a time.

    Attributes:
      responses: by path and status; 499 where the client left.
      finished: sequences by the reason of their end.
      prompt_tokens, generated_tokens: of all sequences.
      first_token: seconds from a request's arrival to the first token of each of its sequences.
      duration: seconds from a request's arrival to the end of each of its sequences.
    """

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        self.finished: Counter[str] = Counter(dict.fromkeys(("stop", "length", "failed", "cancelled"), 0))
        self.prompt_tokens = self.generated_tokens = 0
        self.first_token, self.duration = Histogram(), Histogram()

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Everything, with `gauges`, which are names with their help and value."""
        return "\n".join(self._lines(gauges)) + "\n"

    def _lines(self, gauges: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        for name, (words, value) in gauges.items():
            yield from _head(name, "gauge", words)
            yield f"polarjax_{name} {value}"
        yield from _head("responses_total", "counter", "HTTP responses; 499 where the client left.")
        for (path, status), count in sorted(self.responses.items()):
            yield f'polarjax_responses_total{{path="{path}",status="{status}"}} {count}'
        yield from _head("sequences_total", "counter", "Sequences that ended, by the reason.")
        for reason, count in sorted(self.finished.items()):
            yield f'polarjax_sequences_total{{finished="{reason}"}} {count}'
        for kind, count in (("prompt", self.prompt_tokens), ("generated", self.generated_tokens)):
            yield from _head(
                f"{kind}_tokens_total", "counter", f"{kind.capitalize()} tokens of all sequences."
            )
            yield f"polarjax_{kind}_tokens_total {count}"
        for name, histogram, words in (
            (
                "first_token_seconds",
                self.first_token,
                "From a request's arrival to a sequence's first token.",
            ),
            ("sequence_seconds", self.duration, "From a request's arrival to a sequence's end."),
        ):
            yield from _head(name, "histogram", words)
            yield from histogram.lines(f"polarjax_{name}")


def _head(name: str, kind: str, words: str) -> Iterator[str]:
    yield f"# HELP polarjax_{name} {words}"
    yield f"# TYPE polarjax_{name} {kind}"
