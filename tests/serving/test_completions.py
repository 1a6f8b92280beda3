"""What clients of OpenAI's interface get: the tokens of `complete` and `generate`, whole and streamed, 64 at once."""

import asyncio
import json

import jax
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import polarjax as pj
from polarjax.engine.requests import Event
from polarjax.generation.logprobs import LogProbs
from polarjax.serving.body import parse
from polarjax.serving.replies import Model, Reply
from polarjax.text.assembly import Assembler
from polarjax.text.tokenizer import Tokenizer
from tests.serving.server import NAME, Server, bundle, serving
from tests.text import hf_tokenizers

PROMPTS = ["def f", "Once upon a time", "ünï", "A"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, ünï!"}]


@pytest.fixture(scope="module")
def server():
    with serving() as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Server):
    with openai.OpenAI(base_url=server.url, api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> list[pj.Completion]:
    """What `complete` makes of the prompts and the conversation."""
    return bundle().complete([*PROMPTS, CHAT], max_new_tokens=12)


def test_completions_are_those_of_complete(client, expected):
    """Texts, ids, and several of either in one request."""
    encode = bundle().tokenizer.hf.encode
    for given in (PROMPTS, [encode(each) for each in PROMPTS]):
        made = client.completions.create(model=NAME, prompt=given, max_tokens=12)
        assert [each.text for each in made.choices] == [each.text for each in expected[:4]]
        assert [(each.index, each.finish_reason) for each in made.choices] == [
            (i, "length") for i in range(4)
        ]
        tokens = sum(len(encode(each)) for each in PROMPTS)
        assert (made.object, made.model) == ("text_completion", NAME)
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (tokens, 48)
        assert made.usage.total_tokens == tokens + 48
        alone = client.completions.create(model=NAME, prompt=given[2], max_tokens=12)
        assert alone.choices[0].text == expected[2].text
    assert len(client.completions.create(model=NAME, prompt="A").choices[0].text) > 0


def test_chats_are_those_of_complete(client, expected):
    """Through the chat template; parts of text are joined, and a developer's message is the system's."""
    parts = [{"type": "text", "text": "Hi, ünï!"}]
    developer = [CHAT[0] | {"role": "developer"}, CHAT[1] | {"content": parts}]
    for messages in (CHAT, developer):
        made = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=12)
        assert made.object == "chat.completion"
        assert made.choices[0].message.role == "assistant"
        assert made.choices[0].message.content == expected[4].text
    whole = client.chat.completions.create(model=NAME, messages=CHAT)
    used = whole.usage
    assert used.total_tokens == 65, "by default, a chat goes on until its slot is full"


@pytest.mark.parametrize("usage", [False, True])
def test_streams_are_what_comes_in_one_piece(client, expected, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    texts, ends, last = [""] * 4, [None] * 4, None
    for chunk in client.completions.create(model=NAME, prompt=PROMPTS, max_tokens=12, stream=True, **options):
        assert last is None, "the usage comes last"
        for choice in chunk.choices:
            assert ends[choice.index] is None, "nothing comes after the end"
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
        last = chunk.usage
    assert texts == [each.text for each in expected[:4]] and ends == ["length"] * 4
    assert (last is not None) == usage
    deltas = list(
        client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=12, stream=True, **options)
    )
    found = [choice for chunk in deltas for choice in chunk.choices]
    assert "".join(each.delta.content for each in found) == expected[4].text
    assert [each.delta.role for each in found] == ["assistant", *[None] * (len(found) - 1)]
    assert [each.finish_reason for each in found] == [*[None] * (len(found) - 1), "length"]
    assert {chunk.object for chunk in deltas} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in deltas}) == 1
    if usage:
        assert deltas[-1].usage.completion_tokens == 12 and not deltas[-1].choices


def test_events_end_with_done(server):
    answer = server.complete(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(each.removeprefix("data: "))["id"] for each in events[:-2])


def test_seeds_draw_what_generate_draws(client, expected):
    """Sequence i of n draws with the seed + i; without a seed, no two are alike."""
    model, tokenizer = bundle().model, bundle().tokenizer
    settings = {"temperature": 1.5, "top_p": 0.9}
    made = client.completions.create(model=NAME, prompt="def f", max_tokens=12, n=3, seed=7, **settings)
    ids, lengths = tokenizer.encode(["def f"])
    for i, choice in enumerate(made.choices):
        drawn = pj.generate(
            model,
            ids,
            lengths,
            jax.random.key(7 + i),
            sampler=pj.Categorical(1.5, top_p=0.9),
            max_new_tokens=12,
        )
        assert choice.text == tokenizer.decode(drawn.tokens)[0]
    free = [client.completions.create(model=NAME, prompt="def f", n=2, **settings) for _ in range(2)]
    assert len({choice.text for each in free for choice in each.choices}) == 4
    calm = client.completions.create(model=NAME, prompt="def f", max_tokens=12, temperature=0, n=2, top_p=0.5)
    assert {each.text for each in calm.choices} == {expected[0].text}


def test_stop_strings_are_cut_off(client, expected):
    """Across tokens and inside of one; streamed text never shows part of one."""
    text = expected[1].text
    stops = [text[5:9], "never seen"]
    cut = text[: text.index(stops[0])]
    for stop in (stops, stops[0]):
        made = client.completions.create(model=NAME, prompt=PROMPTS[1], max_tokens=12, stop=stop)
        assert (made.choices[0].text, made.choices[0].finish_reason) == (cut, "stop")
    chunks = client.completions.create(model=NAME, prompt=PROMPTS[1], max_tokens=12, stop=stops, stream=True)
    assert "".join(each.choices[0].text for each in chunks) == cut
    stop_id = expected[1].tokens[4]
    ended = client.completions.create(
        model=NAME, prompt=PROMPTS[1], max_tokens=12, extra_body={"stop_token_ids": [stop_id]}
    )
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens == expected[1].tokens.index(stop_id) + 1


def test_log_probabilities_are_those_of_generate(client):
    """In the shapes of both interfaces, streamed or not; bytes of tokens add up to the text."""
    ids, lengths = bundle().tokenizer.encode(["ünï"])
    made = pj.generate(bundle().model, ids, lengths, max_new_tokens=12, logprobs=3)
    chosen, best = made.logprobs.chosen[0].tolist(), np.asarray(made.logprobs.best)[0].ravel().tolist()
    whole = client.completions.create(model=NAME, prompt="ünï", max_tokens=12, logprobs=3).choices[0]
    found = whole.logprobs
    assert found.token_logprobs == pytest.approx(chosen, rel=1e-5)
    assert [value for each in found.top_logprobs for value in each.values()] == pytest.approx(best, rel=1e-5)
    for token, start in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or whole.text[start:].startswith(token)
    chunks = client.completions.create(model=NAME, prompt="ünï", max_tokens=12, logprobs=3, stream=True)
    parts = [each.choices[0].logprobs for each in chunks if each.choices[0].logprobs]
    assert [token for each in parts for token in each.tokens] == found.tokens
    assert [place for each in parts for place in each.text_offset] == found.text_offset
    chat = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=12, logprobs=True, top_logprobs=2
    ).choices[0]
    content = chat.logprobs.content
    data = b"".join(bytes(each.bytes) for each in content)
    assert data.decode(errors="replace") == chat.message.content
    assert all(len(each.top_logprobs) == 2 for each in content)
    assert all(each.logprob == max(other.logprob for other in each.top_logprobs) for each in content)
    assert (
        client.completions.create(model=NAME, prompt="A", logprobs=0).choices[0].logprobs.top_logprobs
        == [{}] * 16
    )


def test_of_tokens_that_read_alike_the_likeliest_is_reported(tmp_path):
    """Such as a letter and its byte."""
    tokenizer = Tokenizer.load(hf_tokenizers.write_llama(tmp_path))
    ids = tokenizer.hf.convert_tokens_to_ids(["e", "<0x65>", "x"])
    asked = parse({"prompt": "a", "logprobs": 3}, tokenizer.generation, chat=False, model=NAME)
    reply = Reply(asked, [np.array([1])], Model(NAME, tokenizer))
    logprobs = LogProbs(np.float32([-0.5]), np.array([ids]), np.float32([[-0.5, -8, -9]]))
    reply.add(0, Event(0, (ids[0],), "e", None, logprobs))
    (choice,) = reply.whole["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"e": -0.5, "x": -9}]


def test_echo_gives_the_prompt_back(client, expected):
    made = client.completions.create(model=NAME, prompt=PROMPTS, max_tokens=12, echo=True)
    texts = [prompt + each.text for prompt, each in zip(PROMPTS, expected, strict=False)]
    assert [each.text for each in made.choices] == texts
    chunks = client.completions.create(model=NAME, prompt="def f", max_tokens=12, echo=True, stream=True)
    assert "".join(each.choices[0].text for each in chunks) == texts[0]


def test_models(client, server):
    assert [each.id for each in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "polarjax"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")
    assert server.send("/health").json == {"status": "ok"}


def test_metrics_are_what_prometheus_reads(server):
    """Every request is counted once, by what became of it."""
    read = lambda: {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(server.send("/metrics").body.decode())
        for sample in family.samples
    }
    before = read()
    assert server.complete(n=2).status == 200 and server.complete(n=0).status == 400
    after = read()
    changed = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    path = "/v1/completions"
    expected = {
        ("polarjax_responses_total", (path, "200")): 1,
        ("polarjax_responses_total", (path, "400")): 1,
        ("polarjax_sequences_total", ("length",)): 2,
        ("polarjax_prompt_tokens_total", ()): 6,
        ("polarjax_generated_tokens_total", ()): 8,
        ("polarjax_first_token_seconds_count", ()): 2,
        ("polarjax_first_token_seconds_bucket", ("+Inf",)): 2,
        ("polarjax_sequence_seconds_count", ()): 2,
    }
    assert changed.items() >= expected.items()
    assert after["polarjax_slots", ()] == 4 and after["polarjax_up", ()] == 1


def test_64_clients_at_once(server, expected):
    """Each streams or waits, draws or doesn't, and gets what it gets alone; a few slots serve all, and none is lost."""
    prompts = [PROMPTS[i % 4] for i in range(64)]
    counts = [1 + i // 4 % 12 for i in range(64)]

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        given = {"model": NAME, "prompt": prompts[i], "max_tokens": counts[i]}
        if i % 2:
            return (await client.completions.create(**given)).choices[0].text
        chunks = await client.completions.create(**given, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    before = server.metric('polarjax_sequences_total{finished="length"}')
    texts = asyncio.run(everybody())
    for i, text in enumerate(texts):
        assert text == text_of(prompts[i], expected[i % 4].tokens[: counts[i]])
    assert server.metric('polarjax_sequences_total{finished="length"}') == before + 64
    assert (server.engine.in_use, server.engine.waiting, server.service.active) == (0, 0, 0)


def text_of(prompt: str, tokens: tuple[int, ...]) -> str:
    """The text of tokens after a prompt."""
    tokenizer = bundle().tokenizer
    row = Assembler(tokenizer.decode_ids, context=tokenizer.hf.encode(prompt))
    return row.push(tokens) + row.finish()
