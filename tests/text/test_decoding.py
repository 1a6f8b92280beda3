"""The bytes of single tokens, of both kinds of tokenizers."""

import pytest
from transformers import PreTrainedTokenizerFast

from polarjax.text.decoding import TokenBytes
from tests.text.hf_tokenizers import byte_fallback, byte_level


@pytest.mark.parametrize("text", ["Hello wörld 日本 👍", "a  b\n", "</s>"])
@pytest.mark.parametrize(
    ("make", "before"), [(lambda: byte_level(["<s>", "</s>"]), ""), (byte_fallback, " ")]
)
def test_bytes_of_tokens_add_up_to_the_text(make, before, text):
    """Also where a character is several tokens; special tokens are their names, and unused ids nothing."""
    hf = PreTrainedTokenizerFast(tokenizer_object=make())
    bytes_of = TokenBytes(hf)
    found = b"".join(map(bytes_of, hf.encode(text, add_special_tokens=False)))
    assert found.decode().removeprefix(before) == text
    assert bytes_of(10**6) == b""
