"""The files in configs/: the paper's parameter counts, and that every run can be built."""

import functools
import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from blocktx.config.conversion import from_config_dict, to_config_dict
from blocktx.config.model import EmbedderConfig, StackConfig
from blocktx.cost import count_params
from blocktx.model.build import build

FILE = pathlib.Path(__file__).parents[1] / "configs" / "paper.py"


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paper = load(FILE)


def run(name: str):
    return from_config_dict(paper.get_config(name))


def parsed(*overrides: str, name: str):
    """What a launch script gets from its flags."""
    argv = ["train.py", f"--config={FILE}:{name}", *overrides]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return from_config_dict(holder.value)


def printed(text: str) -> tuple[float, float]:
    """A number as the paper prints it, and the unit of its last significant digit."""
    digits, scale = text[:-1], {"M": 1e6, "B": 1e9}[text[-1]]
    unit = 10.0 ** (len(digits) - len(digits.rstrip("0"))) if "." not in digits else 0.1
    return float(digits) * scale, unit * scale


@functools.cache
def traced(model):
    """Shapes of the logits of three blocks, and of the parameters."""
    net = build(model)
    tokens = jnp.zeros((1, 3, model.block_length) if model.kind == "block" else (1, 3), jnp.int32)
    made = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), tokens, tokens))
    return nn.meta.unbox(made)


def in_stacks(model) -> int:
    """Parameters of all layers and final norms: what the paper calls non-embedding."""
    _, variables = traced(model)
    return sum(
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(variables)
        if "stack" in {key.key for key in path}
    )


@pytest.mark.parametrize(
    ("name", "total", "inner"),
    [
        ("block_33m", "33M", "5M"),
        ("block_77m", "77M", "19M"),
        ("block_170m", "170M", "85M"),
        ("block_420m", "420M", "302M"),
        ("block_1b", "1.0B", "805M"),
        ("block_1b4", "1.4B", "1.2B"),
        ("vanilla_70m", "70M", "19M"),
        ("vanilla_160m", "160M", "85M"),
        ("vanilla_410m", "410M", "302M"),
        ("megabyte_5m", None, "5M"),
        ("megabyte_19m", None, "19M"),
        # The authors' own sizes make another number than their table has.
        ("vanilla_31m", "40M", "14M"),
        ("megabyte_85m", None, "91M"),
    ],
)
def test_parameters_are_those_of_the_paper(name, total, inner):
    # It rounds 4.74M to 5M and cuts 805.7M to 805M: both are less than one unit away. Its
    # non-embedding parameters are those of the layers, without what is between the decoders.
    model = run(name).model
    wanted, unit = printed(inner)
    assert abs(in_stacks(model) - wanted) < unit
    if total:
        wanted, unit = printed(total)
        assert abs(count_params(model)[0] - wanted) < unit


def test_vanilla_31m_of_the_paper_has_a_narrower_mlp():
    model = parsed("--config.model.decoder.mlp_width=1024", name="vanilla_31m").model
    total, inner, _ = count_params(model)
    assert abs(total - 31e6) < 1e6
    assert abs(inner - 5e6) < 1e6


@pytest.mark.parametrize("name", paper.NAMES)
def test_run_is_described_whole(name):
    config = run(name)
    assert from_config_dict(to_config_dict(config)) == config
    tokens = config.training.steps * config.training.batch_size * config.model.context_length
    if name.startswith("uptrain_"):
        assert tokens == pytest.approx(30e9, rel=1e-3)
    elif name.startswith("flops_"):
        assert tokens < 300e9
    else:
        assert tokens == pytest.approx(300e9, rel=1e-5)
    assert config.data.random_padding == (
        name.startswith("uptrain_")
        or (config.model.kind == "block" and config.model.block_decoder.width < 1024)
    )
    assert (config.model.compute_dtype, config.model.param_dtype) == ("bfloat16", "float32")
    assert (config.optimizer.weight_decay, config.optimizer.schedule) == (0.1, "linear")
    assert config.optimizer.warmup_steps * config.training.batch_size == 3000 * 256


@pytest.mark.parametrize(
    "model", dict.fromkeys(run(name).model for name in paper.NAMES), ids=lambda model: ""
)
def test_model_can_be_built_and_traced(model):
    logits, _ = traced(model)
    predicted = (2, model.block_length) if model.kind == "block" else (3,)
    assert logits.shape == (1, *predicted, model.vocab_size)
    assert logits.dtype == jnp.float32


def test_ablations_are_what_their_names_say():
    def decoders(name):
        model = run(name).model
        return model.block_decoder.layers, model.token_decoder.layers

    assert [decoders(f"ratio_{r}") for r in ("5_1", "2_1", "1_1", "1_2", "1_5")] == [
        *[(10, 2), (8, 4), (6, 6), (4, 8), (2, 10)]
    ]
    main = run("block_170m")
    assert run("ratio_1_1") == run("length_4") == run("prefix_2") == main
    assert [run(f"length_{n}").model.block_length for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert [run(f"prefix_{n}").model.prefix_length for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    cls = run("embedder_cls").model.embedder
    assert (cls.cls_tokens, cls.encoder.layers, cls.encoder.width) == (3, 3, 256)
    assert run("megabyte_85m").model.token_decoder == StackConfig(layers=4, width=512, heads=8)
    assert run("uptrain_160m").model.embedder == EmbedderConfig(kind="projection", width=768)
    assert run("uptrain_31m").model.token_decoder.mlp_size == 4096


def test_flags_override_fields_of_a_named_run():
    config = parsed(
        *("--config.model.block_decoder.mlp_width=100", "--config.training.steps=5000"),
        *("--config.loss.block_decoding=mse", "--config.loss.auto_encoding=true"),
        name="block_170m",
    )
    assert config.model.block_decoder.mlp_width == 100
    assert config.training.steps == 5000
    assert set(config.loss.weights) == {"block_decoding_loss", "auto_encoding_loss"}
    assert config.model.token_decoder == run("block_170m").model.token_decoder


@pytest.mark.parametrize(
    ("name", "problem"), [("", " needs a name"), ("block_171m", ":block_171m: unknown")]
)
def test_unknown_name_lists_those_that_there_are(name, problem):
    with pytest.raises(ValueError, match=f"^configs/paper.py{problem}") as info:
        paper.get_config(name)
    assert all(known in str(info.value) for known in paper.NAMES)


def test_docstring_begins_with_the_command_and_lists_every_name():
    lines = paper.__doc__.splitlines()
    assert lines[2].startswith("    python launch/train.py --config=configs/paper.py:")
    listed = []
    for line in lines[3:]:
        if line.startswith("    ") and not line.strip().startswith("--"):
            first, *rest = line[4:].partition("  ")[0].split()
            for name in rest:  # "_77m" after "block_33m" is block_77m
                end = name.count("_")
                listed.append(first.rsplit("_", end)[0] + name if name[0] == "_" else name)
            listed.append(first)
    assert sorted(listed) == sorted(paper.NAMES)
