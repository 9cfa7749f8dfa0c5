"""`blocktx.load` and text in, text out, on a run of four steps."""

import dataclasses
import gc
import shutil

import jax
import numpy as np
import pytest

import blocktx
from blocktx.benchmark.candidates import equal_vanilla
from blocktx.config.model import BlockConfig, StackConfig
from blocktx.cost import count_params
from blocktx.data.tokenizer import Tokenizer
from blocktx.decode import texts
from blocktx.decode.continuous import ContinuousDecoder
from blocktx.decode.engine import Generation
from blocktx.decode.generate import Generated
from blocktx.decode.sampling import SamplingConfig
from blocktx.progress_bar import ProgressBar
from blocktx.train.loop import train
from tests.helpers.compile_events import compilations
from tests.helpers.tiny_run import run_config, write_corpus

RETURN_NONE = dict(return_logprobs=False)
PROMPTS = ["token cache", "", "lookup", "a \N{GRINNING FACE} in a block"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, its configuration and its last state."""
    folder = tmp_path_factory.mktemp("engine")
    data = dataclasses.replace(write_corpus(folder), holdout_every=0)  # spares the evaluation
    config = run_config(data)
    return folder / "run", config, train(config, folder / "run")


@pytest.fixture(scope="module")
def engine(trained):
    return blocktx.load(trained[0])


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/4"])
def test_load(trained, below):
    workdir, config, state = trained
    engine = blocktx.load(workdir / below)
    assert engine.config == dataclasses.replace(
        config, model=dataclasses.replace(config.model, scan_layers=False)
    )
    saved = Tokenizer.load(workdir / "tokenizer.json", config.data.end_token, config.data.pad_token)
    assert engine.tokenizer.fingerprint == saved.fingerprint
    _, expected = blocktx.model.params.for_decoding(engine.model, state.params)
    jax.tree.map(np.testing.assert_array_equal, engine.params, expected)


def test_params_fit_the_model(engine):
    tokens = np.zeros((1, 3, 4), int)
    logits = jax.jit(engine.model.apply)({"params": engine.params}, tokens, np.ones_like(tokens))
    assert logits.shape == (1, 2, 4, engine.config.model.vocab_size)
    assert np.isfinite(logits).all()


def test_string_or_list(engine):
    text = engine.generate("token", max_new_tokens=6, seed=1)
    assert isinstance(text, str)
    assert engine.generate(["token"], max_new_tokens=6, seed=1) == [text]
    assert engine.generate(("token",), max_new_tokens=6, seed=1) == [text]


def test_row_of_a_ragged_batch_is_what_it_is_alone(engine):
    together = engine.generate(PROMPTS, max_new_tokens=9, temperature=0)
    alone = [engine.generate(prompt, max_new_tokens=9, temperature=0) for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) > 1


def test_weights_and_cache_in_int8(trained, engine):
    rounded = blocktx.load(trained[0], quantize="int8", cache_dtype="int8")
    assert rounded.model.formulations.cache_dtype == "int8"
    assert rounded.model.create_cache(1, 4)[0].k_SxE.dtype == np.int8
    options = dict(max_new_tokens=4, temperature=0, return_logprobs=True)
    for rows in (4, 2):  # a batch, and continuously
        pairs = [model.generate(PROMPTS, rows=rows, **options) for model in (engine, rounded)]
        for exact, near in zip(*pairs, strict=True):
            np.testing.assert_allclose(near.logprobs[0], exact.logprobs[0], atol=0.02)
    with pytest.raises(ValueError, match=r"^cache_dtype: got 'int3'; use one of"):
        blocktx.load(trained[0], cache_dtype="int3")


def test_text_is_what_the_tokens_say_up_to_the_end(engine, monkeypatch):
    """The prompts' tokens go in left-padded; what comes out ends before the end token."""
    tokenizer, given = engine.tokenizer, {}
    word = tokenizer.encode("block token")

    def fake(model, params, tokens_BxT, mask_BxT, **options):
        given.update(options, tokens=tokens_BxT, mask=mask_BxT)
        tokens = np.array([[*word, tokenizer.end_id, tokenizer.pad_id], [*word, 5, 6]])
        count = np.array([len(word) + 1, len(word) + 2])
        yield Generated(tokens, None, count, np.array([True, False]), np.array([True, True]))

    monkeypatch.setattr(texts, "generate_blocks", fake)
    first, second = engine.generate(["", "token cache"], max_new_tokens=9, top_k=3, stop=7)
    assert first == "block token"
    assert second == "block token" + tokenizer.decode([5, 6])
    row = tokenizer.encode("token cache")
    padding = [tokenizer.pad_id] * (len(row) - 1)
    assert given["tokens"].tolist() == [[*padding, tokenizer.end_id], row]  # starts a document
    assert given["mask"].astype(int).tolist() == [[0] * len(padding) + [1], [1] * len(row)]
    assert given["max_new_tokens"].tolist() == [9, 9]
    assert given["sampling"] == [SamplingConfig(top_k=3)] * 2
    assert given["seed"] == 0
    assert given["stop"] == [tokenizer.end_id, 7]
    assert given["pad_id"] == tokenizer.pad_id


@pytest.mark.parametrize("sampled", [dict(temperature=0), dict(seed=5, temperature=3.0)])
def test_stream_is_the_text_in_parts(engine, sampled):
    options = dict(max_new_tokens=14, **sampled)
    texts = engine.generate(PROMPTS, **options)
    parts = list(engine.generate(PROMPTS, stream=True, **options))
    assert ["".join(row) for row in zip(*parts, strict=True)] == texts
    assert len(parts) > 1
    assert all(any(part) for part in parts)
    alone = engine.generate(PROMPTS[0], stream=True, **options)
    assert next(alone) + "".join(alone) == texts[0]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text(engine, stream):
    options = dict(max_new_tokens=20, temperature=3.0, seed=2)
    whole = engine.generate(PROMPTS, **options)
    stop = whole[0][3:6]
    assert sum(stop in text for text in whole) < len(whole)
    got = engine.generate(PROMPTS, stop=["never there", stop], stream=stream, **options)
    if stream:
        got = ["".join(row) for row in zip(*got, strict=True)]
    assert got == [text.split(stop)[0] for text in whole]


def test_generations(engine):
    options = dict(max_new_tokens=[20, 6, 20, 3], temperature=3.0, seed=2)
    texts = engine.generate(PROMPTS, **options)
    plain = engine.generate(PROMPTS, return_logprobs=True, **options)
    for text, generation in zip(texts, plain, strict=True):
        assert generation.text == text == engine.tokenizer.decode(generation.tokens)
        assert generation.finish_reason == "length"
        assert len(generation.logprobs) == len(generation.tokens)
        assert max(generation.logprobs) < 0
    assert [len(generation.tokens) for generation in plain] == options["max_new_tokens"]
    token, string = plain[2].tokens[7], texts[0][5:9]
    stopped = engine.generate(PROMPTS, return_logprobs=True, stop=[token, string], **options)
    assert [g.finish_reason for g in stopped] != ["length"] * 4
    for before, after in zip(plain, stopped, strict=True):
        count = len(after.tokens)
        assert after.tokens == before.tokens[:count]
        assert after.logprobs == before.logprobs[:count]
        assert before.text.startswith(after.text)
        assert string not in after.text
        at_end = after.tokens[-1] == token or string in engine.tokenizer.decode(after.tokens)
        assert (after.finish_reason == "stop") == at_end
        assert token not in after.tokens[:-1]
    single = engine.generate(PROMPTS[0], return_logprobs=True, max_new_tokens=2)
    assert isinstance(single, Generation)


def test_placement_is_that_of_the_training(trained, engine):
    config = dataclasses.replace(
        engine.config, data=dataclasses.replace(engine.config.data, random_padding=False)
    )
    unpadded = blocktx.Engine(config, engine.params, engine.tokenizer)
    prompt = "token cache block lookup prefix"
    assert len(engine.tokenizer.encode(prompt)) % 4
    options = dict(max_new_tokens=12, temperature=0)
    pad, force = (engine.generate(prompt, placement=p, **options) for p in ("pad", "force"))
    assert pad != force
    assert (engine.generate(prompt, **options), unpadded.generate(prompt, **options)) == (
        pad,
        force,
    )


def test_nothing_is_compiled_or_left_behind_by_a_second_call(engine):
    def use(seed):
        prompts = [str(seed), "token", "\N{ROCKET}"][: 3 + seed % 2]
        engine.generate(prompts, max_new_tokens=8 + seed, seed=seed, stop=["x", "yz"][seed % 2 :])
        stream = engine.generate(prompts, max_new_tokens=8, stream=True, temperature=seed / 9)
        next(stream)  # and leave it there

    use(0)
    gc.collect()
    before = len(jax.live_arrays())
    with compilations() as compiled:
        for seed in range(1, 15):
            use(seed)
    gc.collect()
    assert not compiled
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(stream=True, return_logprobs=True),
            "return_logprobs: cannot be combined with stream",
        ),
        (dict(stop=3.5), "stop: got 3.5, expected strings and token ids"),
        (dict(stop=["a", None]), "stop: got .*, expected strings, none empty, and token ids"),
        (dict(stop=[""]), "expected strings, none empty"),
        (dict(placement="left", stream=True), "placement: got 'left'"),  # before the first part
    ],
)
def test_bad_options(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.generate("token", **options)


def test_prompt_without_a_known_character(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "encode", lambda *_, **__: [])
    with pytest.raises(ValueError, match="prompts: row 0, 'token', has nothing the tokenizer"):
        engine.generate("token")


def test_prompts_of_token_ids(engine):
    ids = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    given = [ids[0], PROMPTS[1], *ids[2:]]
    settings = dict(max_new_tokens=6, temperature=0.0)
    assert engine.generate(given, **settings) == engine.generate(PROMPTS, **settings)


def test_arrays_are_prompts_and_options(engine):
    ids = [[3, 4, 5], [6, 7, 8]]
    texts = engine.generate(ids, max_new_tokens=[5, 6], temperature=0)
    numpy, arrays = np.array(ids), jax.numpy.array(ids)
    budget = np.array([5, 6])
    for given in (numpy, arrays, list(numpy), list(arrays)):
        assert engine.generate(given, max_new_tokens=budget, temperature=np.array(0)) == texts
    assert engine.generate(numpy[:1], max_new_tokens=np.array(5), temperature=0) == texts[:1]
    for given in (numpy[0], numpy * 1.0, np.array(3), [numpy]):
        with pytest.raises(ValueError, match="expected a string, or a list"):
            engine.generate(given)


def test_sampling_of_each_prompt(engine):
    configs = [SamplingConfig(0), SamplingConfig(2.0), SamplingConfig(2.0, top_k=3)]
    options = dict(max_new_tokens=9, seed=[1, 2, 3])
    got = engine.generate(["token"] * 3, sampling=configs, **options)
    settings = [dict(temperature=0), dict(temperature=2.0), dict(temperature=2.0, top_k=3)]
    for text, seed, one in zip(got, options["seed"], settings, strict=True):
        assert engine.generate("token", seed=[seed], max_new_tokens=9, **one) == text
    with pytest.raises(ValueError, match=r"sampling: got .* and also top_k; use one"):
        engine.generate("token", sampling=configs[0], top_k=3)


@pytest.mark.parametrize("return_logprobs", [False, True])
def test_more_prompts_than_rows_are_decoded_continuously(engine, return_logprobs):
    prompts = [*PROMPTS, *PROMPTS[::-1], *(prompt[:5] for prompt in PROMPTS)]
    options = dict(
        max_new_tokens=[1 + 5 * (i % 4) for i in range(12)],
        sampling=[SamplingConfig([0, 3.0, 1.0][i % 3]) for i in range(12)],
        seed=list(range(12)),
        stop=["x", engine.generate("token", max_new_tokens=20, temperature=0)[3:6]],
        return_logprobs=return_logprobs,
    )
    together = engine.generate(prompts, rows=12, **options)
    continuous = engine.generate(prompts, rows=3, **options)
    if not return_logprobs:
        assert continuous == together
        parts = list(engine.generate(prompts, rows=3, stream=True, **options | RETURN_NONE))
        assert ["".join(row) for row in zip(*parts, strict=True)] == together
        return
    for got, expected in zip(continuous, together, strict=True):
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)
        same = dict(logprobs=None)
        assert dataclasses.replace(got, **same) == dataclasses.replace(expected, **same)
    assert {got.finish_reason for got in continuous} == {"stop", "length"}


def test_a_thousand_prompts_share_rows_programs_and_a_progress_bar(engine, monkeypatch):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 300, rng.integers(1, 17)).tolist() for _ in range(1000)]
    budgets = np.minimum(rng.geometric(1 / 4, 1000), 16).tolist()
    bars, blocks = [], []

    class Bar(ProgressBar):
        def close(self):
            bars.append((self.n, self.total, self.desc))
            super().close()

    start = ContinuousDecoder._start

    def counted(self, count):
        blocks.append(count)
        start(self, count)

    monkeypatch.setattr(texts, "ProgressBar", Bar)
    monkeypatch.setattr(ContinuousDecoder, "_start", counted)

    def generate(count):
        return engine.generate(
            prompts[:count],
            max_new_tokens=budgets[:count],
            rows=8,
            temperature=0,
            return_logprobs=True,
        )

    few = generate(20)
    bars.clear()
    blocks.clear()
    with compilations() as compiled:
        many = generate(1000)
    assert not compiled
    assert set(bars) == {(1000, 1000, "generating")}
    assert [g.tokens for g in many[:20]] == [g.tokens for g in few]
    # A block more than the budget's where a budget begins or ends inside a block.
    assert sum(blocks) <= sum(-(-budget // 4) + 1 for budget in budgets) / 8 + 5
    assert sum(blocks) < 0.75 * sum(
        max(-(-b // 4) for b in budgets[i : i + 8]) for i in range(0, 1000, 8)
    )


def test_a_mistake_names_the_prompt_of_many(engine):
    with pytest.raises(ValueError, match=r"prompt of row 2 \(.*\) and 33 new tokens do not fit"):
        engine.generate(["token"] * 4, max_new_tokens=[1, 2, 33, 4], rows=2)
    with pytest.raises(ValueError, match="rows: got 0"):
        engine.generate("token", rows=0)


@pytest.mark.parametrize("prompts", [[], [3], [["token"]], b"token", [b"token"], 3, None])
def test_prompts_must_be_text(engine, prompts):
    with pytest.raises(ValueError, match=r"prompts: got .*, expected a string, or a list"):
        engine.generate(prompts)


def test_an_unknown_option_is_refused_with_the_nearest(engine):
    message = r"generate: no option 'max_tokens'; did you mean max_new_tokens\?"
    with pytest.raises(TypeError, match=message):
        engine.generate("token", max_tokens=4)
    with pytest.raises(TypeError, match="no option 'x'; use temperature, top_k, top_p, min_p"):
        engine.generate("token", x=4)


def test_too_long(engine):
    with pytest.raises(ValueError, match="do not fit the context of 32 tokens"):
        engine.generate("token", max_new_tokens=33)


def test_run_without_tokenizer(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run/tokenizer\.json: not found"):
        blocktx.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_missing_checkpoint(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name}: (there is no such|no finished)"):
        blocktx.load(tmp_path / name)


@pytest.mark.parametrize(
    ("block", "token", "layers"),
    [
        (StackConfig(6, 768, 12), StackConfig(6, 768, 12), 12),  # the paper's 170M and 160M
        (StackConfig(6, 512, 8), StackConfig(4, 256, 8), 7),
    ],
)
def test_vanilla_of_equal_size(block, token, layers):
    config = BlockConfig(
        vocab_size=50_304, context_length=2048, block_decoder=block, token_decoder=token
    )
    vanilla = equal_vanilla(config)
    assert vanilla.decoder == dataclasses.replace(block, layers=layers)
    a_layer = 12 * block.width**2 + 13 * block.width
    assert abs(count_params(vanilla)[1] - count_params(config)[1]) <= a_layer / 2
