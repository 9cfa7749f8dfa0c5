"""Strict configuration: every impossible field is named with its value and with what would do."""

import dataclasses
import json
import math
import re

import pytest

from blocktx.config.conversion import from_config_dict, to_config_dict, to_dict
from blocktx.config.model import (
    BlockConfig,
    EmbedderConfig,
    EncoderConfig,
    StackConfig,
    VanillaConfig,
)
from blocktx.config.run import LossConfig, RunConfig

STACK = StackConfig(layers=2, width=48, heads=4, rotary_fraction=0.5)
SHARED = dict(vocab_size=300, context_length=64)
BLOCK = RunConfig(model=BlockConfig(**SHARED, block_decoder=STACK, token_decoder=STACK))
VANILLA = RunConfig(model=VanillaConfig(**SHARED, decoder=STACK))
RUNS = {
    "block": BLOCK,
    "vanilla": VANILLA,
    "everything": RunConfig(
        model=BlockConfig(
            **SHARED,
            block_length=8,
            embeddings_per_block=2,
            embedder=EmbedderConfig(
                kind="cls", cls_tokens=4, concatenate=True, encoder=EncoderConfig(width=24)
            ),
            block_decoder=STACK,
            token_decoder=StackConfig(layers=1, width=16, heads=2, mlp_width=40),
            conditioning="cross_attention",
            bos_id=7,
        ),
        loss=LossConfig(block_decoding="mse", auto_encoding=True, auto_encoding_weight=0.5),
        seed=3,
    ),
    "projection": dataclasses.replace(
        BLOCK,
        model=dataclasses.replace(
            BLOCK.model, embedder=EmbedderConfig(kind="projection", width=40)
        ),
    ),
}


def changed(run: RunConfig, field: str, value) -> dict:
    """`run` as plain dicts, but for the field at the dotted path."""
    whole = to_dict(run)
    *sections, name = field.split(".")
    node = whole
    for section in sections:
        node = node[section]
    node[name] = value
    return whole


def refused(run: RunConfig, field: str, value) -> str:
    """The message of the error that a value gives."""
    with pytest.raises(ValueError, match=rf"^config\.{re.escape(field)}: ") as info:
        from_config_dict(changed(run, field, value))
    return str(info.value)


@pytest.mark.parametrize("name", RUNS)
def test_round_trips(name):
    run = RUNS[name]
    assert from_config_dict(to_config_dict(run)) == run
    assert from_config_dict(to_dict(run)) == run
    assert from_config_dict(json.loads(json.dumps(to_dict(run)))) == run
    assert hash(run) == hash(from_config_dict(to_dict(run)))


@pytest.mark.parametrize(
    ("field", "suggestion"),
    [
        ("sead", "seed"),
        ("model.block_lenght", "block_length"),
        ("model.embedder.kinds", "kind"),
        ("model.embedder.encoder.head", "heads"),
        ("model.block_decoder.withd", "width"),
        ("data.sources", "source"),
        ("optimizer.learning_rat", "learning_rate"),
        ("loss.auto_encodin", "auto_encoding"),
        ("training.step", "steps"),
    ],
)
def test_unknown_field_is_named_with_a_suggestion(field, suggestion):
    message = refused(BLOCK, field, 4)
    assert f"unknown field (value 4); did you mean '{suggestion}'?" in message
    section = ".".join(["config", *field.split(".")[:-1]])
    assert f"{section} has " in message


def test_unknown_field_like_no_other_lists_those_that_there_are():
    message = refused(BLOCK, "training.zzz", 4)
    assert "did you mean" not in message
    assert "config.training has steps, batch_size, " in message


@pytest.mark.parametrize("field", ["model", "model.vocab_size", "model.block_decoder.heads"])
def test_missing_field_is_named(field):
    whole = to_dict(BLOCK)
    *sections, name = field.split(".")
    node = whole
    for section in sections:
        node = node[section]
    del node[name]
    with pytest.raises(ValueError, match=rf"^config\.{re.escape(field)}: missing"):
        from_config_dict(whole)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("seed", True, "int"),  # a bool is no int
        ("training.steps", 10.0, "int"),
        ("training.steps", "10", "int"),
        ("training.steps", None, "int"),
        ("model.block_decoder.mlp_width", False, "int"),
        ("model.block_decoder.rotary_base", "1e4", "float"),
        ("optimizer.learning_rate", True, "float"),
        ("data.random_padding", 1, "bool"),
        ("loss.auto_encoding", 0, "bool"),
        ("model.scan_layers", "yes", "bool"),
        ("data.source", 3, "str"),
        ("data.source", None, "str"),
    ],
)
def test_wrong_type_is_named(field, value, wanted):
    message = refused(BLOCK, field, value)
    assert f"got {value!r} ({type(value).__name__}), expected {wanted}" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["optimizer.learning_rate", "loss.block_decoding_weight"])
def test_not_finite_is_refused(field, value):
    assert f"got {value!r}, expected a finite number" in refused(BLOCK, field, value)


def test_int_does_for_a_float():
    run = from_config_dict(changed(BLOCK, "optimizer.learning_rate", 1))
    assert type(run.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    "section",
    ["model", "model.embedder", "model.embedder.encoder", "model.token_decoder", "data", "loss"],
)
@pytest.mark.parametrize("value", [3, None, "block", [1]])
def test_section_must_have_fields(section, value):
    assert f"got {value!r}, expected a section with fields" in refused(BLOCK, section, value)


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("model.conditioning", "suffix", "prefix, summation, cross_attention"),
        ("model.embedder.kind", "roberta", "lookup, projection, encoder, cls"),
        ("model.compute_dtype", "float16", "float32, bfloat16"),
        ("model.remat", True, "none, full"),
        ("loss.block_decoding", "l1", "none, mse, contrastive"),
        ("optimizer.schedule", "step", "linear, cosine, constant"),
    ],
)
def test_unknown_choice_lists_those_that_there_are(field, value, choices):
    assert f"got {value!r}; use one of {choices}" in refused(BLOCK, field, value)


@pytest.mark.parametrize("value", ["blok", None, 3])
def test_unknown_kind_of_model(value):
    with pytest.raises(ValueError, match=r"^config\.model\.kind: got .*use one of block, vanilla$"):
        from_config_dict(changed(BLOCK, "model.kind", value))


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("seed", -1, "must be in 0..2^63-1"),
        ("model.vocab_size", 0, "must be greater than 0"),
        ("model.context_length", 0, "must be greater than 0"),
        ("model.context_length", 66, "use 64 or 68"),
        ("model.context_length", 4, "use 8 or 12"),
        ("model.block_length", 0, "must be greater than 0"),
        ("model.block_length", 32 * 4, "not two or more whole blocks"),
        ("model.block_length", 32, "use one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ("model.embeddings_per_block", 0, "must be greater than 0"),
        ("model.prefix_length", 0, "must be greater than 0"),
        ("model.initializer_range", 0.0, "must be greater than 0"),
        ("model.bos_id", 300, "must be a token below vocab_size 300"),
        ("model.bos_id", -1, "must be a token below vocab_size 300"),
        ("model.block_decoder.layers", 0, "must be greater than 0"),
        ("model.block_decoder.width", -48, "must be greater than 0"),
        ("model.block_decoder.heads", 5, "use one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ("model.block_decoder.mlp_width", 0, "must be greater than 0"),
        ("model.token_decoder.rotary_base", 0.0, "must be greater than 0"),
        ("model.token_decoder.rotary_fraction", 1.5, "must be between 0 and 1"),
        ("model.token_decoder.rotary_fraction", 0.25, "must be an even number"),
        ("model.embedder.cls_tokens", 0, "must be greater than 0"),
        ("model.embedder.width", 40, "is for projection only; leave it unset for lookup"),
        ("model.embedder.concatenate", True, "is for cls only"),
        ("model.embedder.encoder.heads", 3, "does not divide width 256"),
        ("model.embedder.encoder.mlp_width", 0, "must be greater than 0"),
        ("model.embedder.encoder.positions", 0, "must be greater than 0"),
        ("model.embedder.encoder.pad_id", -1, "must be 0 or greater"),
        ("data.source", "", "must not be empty"),
        ("data.holdout_every", 1, "use 0 for none or 2 and more"),
        ("optimizer.learning_rate", 0.0, "must be greater than 0"),
        ("optimizer.beta2", 1.0, "must be at least 0 and below 1"),
        ("optimizer.warmup_steps", -1, "must be 0 or greater"),
        ("optimizer.warmup_steps", 1001, "is more than training.steps 1000"),
        ("optimizer.clip_norm", -1.0, "must be 0 or greater"),
        ("loss.block_decoding_weight", -0.5, "must be 0 or greater"),
        ("loss.auto_encoding_weight", -0.5, "must be 0 or greater"),
        ("training.steps", 0, "must be greater than 0"),
        ("training.batch_size", -4, "must be greater than 0"),
        ("training.microbatches", 5, "use one of 1, 2, 4, 8, 16"),
    ],
)
def test_impossible_value_is_named_with_what_would_do(field, value, advice):
    with pytest.raises(ValueError, match=r"^config\.") as info:
        from_config_dict(changed(BLOCK, field, value))
    message = str(info.value)
    assert advice in message
    if "whole blocks" not in advice:  # that one is about two fields
        assert message.startswith(f"config.{field}: ")
        assert str(value) in message


def test_sizes_of_the_cls_embedder_must_fit():
    run = RUNS["everything"]
    assert "use 24" in refused(run, "model.embedder.encoder.width", 32)
    assert "use 14 or more" in refused(run, "model.embedder.encoder.positions", 13)


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_decoding", "mse"), ("auto_encoding", True), ("block_decoding_weight", 0.5)],
)
def test_vanilla_model_has_no_other_losses(field, value):
    message = refused(VANILLA, f"loss.{field}", value)
    assert f"got {value!r}, is for block models only" in message


def test_description_without_losses_is_of_the_plain_loss():
    old = to_dict(RUNS["everything"])
    del old["loss"]
    assert from_config_dict(old).loss == LossConfig()


def test_none_keeps_its_type_and_can_be_set():
    config = to_config_dict(BLOCK)
    assert config.model.block_decoder.mlp_width is None
    with pytest.raises(TypeError):
        config.model.block_decoder.mlp_width = "wide"
    config.model.block_decoder.mlp_width = 100
    assert from_config_dict(config).model.block_decoder.mlp_size == 100
    config.model.block_decoder.mlp_width = None
    assert from_config_dict(config).model.block_decoder.mlp_size == 4 * 48


def test_config_dict_refuses_new_fields():
    with pytest.raises(AttributeError):
        to_config_dict(BLOCK).lock().training.stepz = 4


def test_loss_weights_are_those_of_losses_that_are_on():
    assert LossConfig().weights == {}
    assert LossConfig(block_decoding="mse", block_decoding_weight=0.0).weights == {}
    assert LossConfig(block_decoding="contrastive", auto_encoding=True).weights == {
        "block_decoding_loss": 1.0,
        "auto_encoding_loss": 1.0,
    }
