"""Prompts in blocks: where they are put, and what is refused before anything is traced."""

import dataclasses

import jax
import numpy as np
import pytest

from blocktx.decode.generate import generate, generate_blocks
from blocktx.decode.prompts import layout_prompts
from tests.helpers.compile_events import traces
from tests.helpers.tiny_net import NET, PARAMS

PROMPTS = np.random.default_rng(0).integers(0, 53, (2, 9))
REAL = np.ones_like(PROMPTS)


def run(tokens=PROMPTS, mask=REAL, **options):
    options = dict(max_new_tokens=12) | options
    return np.asarray(generate(NET, PARAMS, tokens, mask, **options))


HOLES = np.array([[1] * 9, [1, 1, 0, 1, 1, 1, 1, 1, 1]])
RIGHT_PADDED = np.array([[1] * 9, [1] * 8 + [0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens: got 0, must be 1 or greater"),
        (dict(max_new_tokens=-3), "max_new_tokens: got -3"),
        (dict(max_new_tokens=2.5), "max_new_tokens: got 2.5"),
        (dict(top_k=2.5), "top_k: got 2.5"),
        (dict(top_k=3_000_000_000), "top_k: got 3000000000"),
        (dict(temperature="1"), "temperature: got '1'"),
        (dict(seed=-1), "seed: got -1, must be a whole number, 0"),
        (dict(seed=1.5), r"seed: got 1.5, must be one whole number or one a row \(2\)"),
        (dict(seed=[1, 2, 3]), r"seed: got \[1, 2, 3\], must be one .* or one a row \(2\)"),
        (dict(seed=[1, "2"]), "seed: got '2', must be a whole"),
        (dict(max_new_tokens=[3]), r"max_new_tokens: got \[3\], must be .* one a row \(2\)"),
        (dict(max_new_tokens=[3, 0]), r"max_new_tokens: got \[3, 0\], must be 1 or greater"),
        (dict(max_new_tokens=[3, 117]), r"row 1 \(9 tokens\) and 117 new .* do not fit"),
        (dict(max_new_tokens=2**40), "max_new_tokens: got 1099511627776, must be below"),
        (dict(max_new_tokens=10**400), "max_new_tokens: got 1000.*, must be below"),
        (dict(temperature=10**400), "temperature: got 1000.*, must be 0"),
        (dict(top_k=10**400), "top_k: got 1000.*, must be 0"),
        (dict(stop=[10**400]), "stop: got 1000.*, must be a token"),
        (dict(pad_id=10**400), "1000.*0 is not in 0..52"),
        (dict(min_p=-0.1), "min_p: got -0.1, must be between 0"),
        (dict(min_p=1.1), "min_p: got 1.1"),
        (dict(stop=["a"]), "stop: got 'a', must be a token"),
        (dict(stop=[-1]), "stop: got -1, must be a token"),
        (dict(placement="left"), "placement: got 'left', must be 'pad' or 'force'"),
        (dict(max_new_tokens=120, placement="force"), "at most 119 new tokens"),
        (dict(max_new_tokens=123, placement="force"), "keep prompts to 5 tokens or ask"),
        (dict(pad_id=53), "tokens: 53 is not in 0..52"),
        (
            dict(max_new_tokens=117),
            r"row 0 \(9 tokens\) and 117 new .* context of 128 .* at most 116 new",
        ),
        (dict(max_new_tokens=128), "ask for at most 116 new tokens"),
        (
            dict(tokens=np.ones((1, 128), int), mask=np.ones((1, 128))),
            "keep prompts to 116 tokens",
        ),
        (dict(tokens=PROMPTS * 1.0), "tokens: got float64, expected integers"),
        (dict(tokens=PROMPTS + 1000 * REAL), "tokens: 10.. is not in 0.."),
        (dict(tokens=-PROMPTS), "tokens: -.* is not in 0.."),
        (dict(mask=REAL * [[1], [0]]), "row 1 of the prompts has no token"),
        (dict(tokens=PROMPTS[:, :0], mask=REAL[:, :0]), "row 0 of the prompts has no token"),
        (dict(mask=HOLES), "row 1 of the mask has padding after a token; left-pad"),
        (dict(mask=RIGHT_PADDED), "row 1 of the mask has padding after a token; left-pad"),
        (dict(mask=REAL[:, 1:]), r"tokens \(2, 9\) and mask \(2, 8\) must both be"),
        (dict(tokens=PROMPTS[0], mask=REAL[0]), r"must both be \[batch, length\], with"),
        (dict(tokens=PROMPTS[:0], mask=REAL[:0]), "with a row or more"),
        (dict(temperature=-0.1), "temperature: got -0.1, must be 0"),
        (dict(temperature=float("nan")), "temperature: got nan"),
        (dict(temperature=float("inf")), "temperature: got inf"),
        (dict(top_k=-1), "top_k: got -1, must be 0"),
        (dict(top_p=0.0), "top_p: got 0.0, must be above 0 and at most 1"),
        (dict(top_p=1.1), "top_p: got 1.1"),
        (dict(top_p=float("nan")), "top_p: got nan"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_input_is_refused_before_anything_is_traced(options, message):
    with traces() as traced, pytest.raises(ValueError, match=message):
        run(**options)
    assert not traced


def test_traces_are_counted():
    with traces() as traced:
        jax.jit(lambda x: x + 1)(0)
    assert traced


def test_every_is_checked():
    with pytest.raises(ValueError, match="every: got 0, must be 1 or greater"):
        generate_blocks(NET, PARAMS, PROMPTS, REAL, max_new_tokens=1, every=0)


def place(lengths, placement, new=5):
    """Prompts that count their tokens from 1, padded with 50 by the caller."""
    tokens = np.array([[50] * (12 - size) + list(range(1, size + 1)) for size in lengths])
    mask = np.arange(12)[::-1] < np.array(lengths)[:, None]
    options = dict(max_new_tokens=new, placement=placement, pad_id=51)
    return layout_prompts(tokens, mask, NET.config, **options)


@pytest.mark.parametrize("placement", ["pad", "force"])
def test_prompts_begin_at_block_0_and_end_before_what_is_drawn(placement):
    lengths = [1, 3, 4, 5, 11, 12]
    prompts = place(lengths, placement, new=[5, 1, 2, 3, 4, 9])
    assert prompts.tokens_BxNxK.shape == (8, 16, 4)  # 6 rows and 3 blocks in their buckets
    for row, size in enumerate(lengths):
        padding = -size % 4 if placement == "pad" or size < 4 else 0
        text = prompts.tokens_BxNxK[row].ravel().tolist()
        assert text == [50] * padding + list(range(1, size + 1)) + [51] * (64 - padding - size)
        assert prompts.padding_B[row] == padding
        assert prompts.begin_B[row] == padding + size
        assert prompts.length_B[row] == (padding + size) // 4
    assert (prompts.end_B - prompts.begin_B).tolist() == [5, 1, 2, 3, 4, 9, 0, 0]
    assert (prompts.length_B * 4 >= prompts.end_B).tolist() == [False] * 6 + [True] * 2
    assert prompts.cache_blocks == 32


def test_buckets_of_prompt_and_new_blocks_end_at_the_context():
    tokens = np.ones((1, 70), int)
    options = dict(placement="pad", pad_id=0)
    config = dataclasses.replace(NET.config, context_length=80)
    prompts = layout_prompts(tokens, tokens, config, max_new_tokens=8, **options)
    assert (prompts.tokens_BxNxK.shape[1], prompts.cache_blocks) == (20, 20 + 16)
    prompts = layout_prompts(tokens, tokens, NET.config, max_new_tokens=8, **options)
    assert (prompts.tokens_BxNxK.shape[1], prompts.cache_blocks) == (32, 32 + 16)
