"""`polarjax generate`: continue prompts with a model directory, dense or sparse."""

from pathlib import Path
from typing import Annotated, Any

import typer

from polarjax.cli.decoding_options import Attention, Dense, Dtype, HeadDensity, Mesh
from polarjax.cli.generate_options import GenerateOptions
from polarjax.cli.many_hosts import agreed

PromptTexts = Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(help="A file or pipe with a prompt per line (text or .jsonl), a .json array, or -: stdin."),
]
Output = Annotated[
    Path | None, typer.Option(help="A file for the completions, a JSON object per line, or -: stdout.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with --output where a run of --prompts was stopped.")
]
Slots = Annotated[
    int | None,
    typer.Option(
        "--slots",
        "--batch-size",
        help="Prompts that run at a time; default: all of --prompt; for a file, what fits into memory.",
    ),
]
Capacity = Annotated[
    int | None,
    typer.Option(
        help="With --prompts: most tokens of a prompt and its answer; default: the model's, at most 4,096."
    ),
]
NewTokens = Annotated[
    int | None, typer.Option(help="Most new tokens per prompt; default: the model's, or 64.")
]
Temperature = Annotated[float | None, typer.Option(help="Draw at this temperature.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most likely tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the nucleus of this probability.")]
Penalty = Annotated[float | None, typer.Option(help="Above 1: make tokens already in the text less likely.")]
Greedy = Annotated[
    bool, typer.Option("--greedy", help="Take the most likely tokens, whatever the model's settings.")
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")]
StopId = Annotated[
    list[int] | None, typer.Option(help="Stop at this token id, instead of the model's; may be repeated.")
]
Copies = Annotated[int, typer.Option(help="Sequences to draw for each prompt.")]
LogProbs = Annotated[
    int | None,
    typer.Option(
        help="With --prompts: log-probabilities of the tokens, and of this many of the likeliest ones."
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Chat = Annotated[bool, typer.Option("--chat", help="Prompts are user messages; use the chat template.")]
System = Annotated[str | None, typer.Option(help="With --chat: the system message.")]
Stream = Annotated[bool, typer.Option("--stream", help="Print the text of one prompt as it is generated.")]
Timed = Annotated[
    bool,
    typer.Option("--timed", help="Time without compilation: run twice, or, with --prompts, compile first."),
]


def generate(
    folder: Annotated[Path, typer.Argument(help="A model directory.")],
    prompt: PromptTexts = None,
    prompts: PromptFile = None,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    slots: Slots = None,
    capacity: Capacity = None,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = None,
    greedy: Greedy = False,
    stop: Stop = None,
    stop_id: StopId = None,
    num_return_sequences: Copies = 1,
    logprobs: LogProbs = None,
    seed: Seed = 0,
    chat: Chat = False,
    system: System = None,
    stream: Stream = False,
    dense: Dense = False,
    head_density: HeadDensity = None,
    dtype: Dtype = None,
    mesh: Mesh = None,
    attention: Attention = None,
    timed: Timed = False,
) -> dict[str, Any]:
    """Continue prompts: sparse where the model has routers, dense otherwise.

    Sampling and stop ids come from the model's generation_config.json; the options here override it, and the lines of
    a .jsonl file override the options. Exit code 3: some lines of a file couldn't be answered.
    """
    options = agreed(GenerateOptions(**locals()))
    from polarjax.cli import answering, generating  # import JAX

    return (generating if prompts is None else answering).run(options)
