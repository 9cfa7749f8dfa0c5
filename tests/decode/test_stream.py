"""Text out of tokens that come a few at a time, with two kinds of decoders."""

import functools

import pytest
import tokenizers
from tokenizers import decoders, models

from blocktx.data.tokenizer import Tokenizer
from blocktx.decode.stream import Continuation, TextStream

TEXT = "caf\u00e9 \N{GRINNING FACE}\N{ROCKET}, \u65e5\u672c\u8a9e! e\u0301"


@pytest.fixture(scope="module")
def byte_level():
    """Every byte is a token: characters of two to four tokens."""
    return Tokenizer.train(["a"], 258, "<|endoftext|>", "<|padding|>")


@pytest.fixture(scope="module")
def byte_fallback():
    """As SentencePiece has it: words that bring their space, and bytes for unknown characters."""
    words = ["\u2581caf", "\u2581", "!", ",", "e"]
    names = ["<end>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    wrapped = Tokenizer(tokenizer, "<end>", "<pad>")
    wrapped.ids = [names.index("\u2581caf")] + [
        2 + byte if byte != 32 else names.index("\u2581") for byte in TEXT[3:].encode()
    ]
    return wrapped


@pytest.fixture(params=["byte_level", "byte_fallback"])
def case(request):
    tokenizer = request.getfixturevalue(request.param)
    tokens = getattr(tokenizer, "ids", None) or tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    return tokenizer, tokens


def parts(tokenizer, tokens, size, stop=()):
    stream, out = TextStream(functools.partial(tokenizer.continuation, []), stop), []
    for end in range(size, len(tokens) + size, size):
        out.append(stream.update(tokens[:end], finished=end >= len(tokens)))
    return stream, out


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_parts_make_up_the_text_in_whole_characters(case, size):
    stream, out = parts(*case, size)
    assert "".join(out) == stream.text == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in TEXT
    if size == 1:  # nothing waits longer than it must
        characters = [part for part in out if part]
        assert characters == (["caf"] if case[1][0] > 257 else list("caf")) + list(TEXT[3:])


def test_what_stays_incomplete_comes_at_the_end(byte_level):
    tokens = byte_level.encode("a\N{ROCKET}")[:-1]
    _, out = parts(byte_level, tokens, 1)
    assert out[:3] == ["a", "", ""]
    assert "".join(out) == byte_level.decode(tokens) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("unfinished", [0, 1, 2])
def test_streams_and_whole_texts_of_a_continuation_are_equal(case, unfinished):
    """Wherever parts begin and end, in the middle of a character too, at the end too."""
    tokenizer, tokens = case
    for prompt in range(len(tokens)):
        before, after = tokens[:prompt], tokens[prompt : len(tokens) - unfinished]
        whole = Continuation(tokenizer, before)
        whole.add(after, [], "length")
        if unfinished == 0:
            assert tokenizer.decode(before).rstrip("\N{REPLACEMENT CHARACTER}") + whole.text == TEXT
        for size in (1, 3, 4):
            text, parts = Continuation(tokenizer, before), []
            for start in range(0, len(after), size):
                reason = "length" if start + size >= len(after) else None
                parts.append(text.add(after[start : start + size], [], reason))
            assert "".join(parts) == text.text == whole.text
            assert text.tokens == after


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["\n\n"], "one\ntwo"),
        (["wor", "two"], "one\n"),
        (["two\n\nx", "\nt"], "one"),
        (["one"], ""),
        (["absent", "three?"], "one\ntwo\n\nthree"),
    ],
)
def test_stop_strings(byte_level, size, stop, expected):
    tokens = byte_level.encode("one\ntwo\n\nthree")
    stream, out = parts(byte_level, tokens, size, stop)
    assert "".join(out) == stream.text == expected
    assert stream.stopped == (expected != "one\ntwo\n\nthree")
    if stream.stopped:
        count = stream.tokens_to_stop(tokens)
        assert any(s in byte_level.decode(tokens[:count]) for s in stop)
        assert not any(s in byte_level.decode(tokens[: count - 1]) for s in stop)
