"""Distillation: losses against independent computation, stages, frozen parameters, runs, caches."""

import dataclasses
import importlib.util
import pathlib
import shutil

import jax
import numpy as np
import pytest

import blocktx.train.distill as module
from blocktx.config.conversion import from_config_dict
from blocktx.config.distill import DistillConfig, StageConfig
from blocktx.config.model import BlockConfig, StackConfig, VanillaConfig
from blocktx.config.run import OptimizerConfig, RunConfig, TrainingConfig
from blocktx.convert.uptrain import uptrain
from blocktx.model.build import build, init_params
from blocktx.parallel.sharding import create_mesh
from blocktx.train.distill import Teacher, distillation_sums, top_log_probs
from blocktx.train.loop import train
from blocktx.train.metrics import read
from blocktx.train.optimizer import multipliers
from blocktx.train.step import create_state, train_step
from blocktx.train.teacher import check_distillation
from blocktx.train.teacher_cache import write_cache
from tests.helpers import eight_devices
from tests.helpers.random_weights import random_params
from tests.helpers.tiny_run import MODEL, run_config

ROOT = pathlib.Path(__file__).parents[2]
STACKS = {
    "neox": lambda layers: StackConfig(layers=layers, width=16, heads=2),
    "llama": lambda layers: StackConfig.llama(layers, 16, 4, key_value_heads=2),
}


def student_config(family: str = "neox") -> BlockConfig:
    stack = STACKS[family](2)
    return BlockConfig(
        vocab_size=24, context_length=24, block_length=4, block_decoder=stack, token_decoder=stack
    )


def teacher_config(family: str = "neox") -> VanillaConfig:
    return VanillaConfig(
        vocab_size=24,
        context_length=24,
        decoder=STACKS[family](3),
        tied_classifier=family == "llama",
    )


STUDENT, TEACHER = student_config(), teacher_config()
ALL = StageConfig(hidden_weight=1.0)


def sums_of(model, params, teacher, batch, config) -> dict[str, jax.Array]:
    """`distillation_sums` of the first stage, in one program."""
    frozen = None if teacher is None else teacher.params

    def sums(params, frozen):
        given = None if teacher is None else Teacher(frozen, teacher.model)
        return distillation_sums(model, params, given, batch, config, 0)

    return jax.jit(sums)(params, frozen)


def distill(**settings) -> DistillConfig:
    return DistillConfig(teacher="teacher", **settings)


def random_teacher(family: str = "neox") -> Teacher:
    model = build(teacher_config(family))
    return Teacher(random_params(model), model)


def random_student(family: str = "neox"):
    model = build(student_config(family))
    return model, random_params(model)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return random_teacher()


@pytest.fixture(scope="module")
def student():
    return random_student()


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Three rows of 6 blocks: whole documents, documents between padding, and little text."""
    rng = np.random.default_rng(1)
    mask = np.ones((3, 24), bool)
    mask[1, [0, 1, 2, 9, 10, 11, 12, 23]] = False  # leading, two blocks apart, and trailing
    mask[2, :6] = mask[2, 10:] = False  # a block of padding first, and three last
    tokens = np.where(mask, rng.integers(2, 24, mask.shape), 1).astype(np.int32)
    return {"tokens": tokens.reshape(3, 6, 4), "mask": mask.reshape(3, 6, 4)}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits_and_contexts(model, params, batch):
    def both(model, tokens, mask):
        return model(tokens, mask), model.contexts(tokens, mask)

    return model.apply({"params": params}, batch["tokens"], batch["mask"], method=both)


def by_hand(student, teacher, batch, temperature: float, layer: int) -> dict[str, float]:
    """The three sums, token by token: the teacher reads what stands before each token alone."""
    tokens, mask = batch["tokens"], batch["mask"]
    logits, contexts = map(
        np.asarray, jax.jit(logits_and_contexts, static_argnums=0)(*student, batch)
    )
    sums = dict.fromkeys(("loss", "kl_loss", "hidden_loss"), 0.0)
    read = jax.jit(
        lambda tokens, mask: teacher.model.apply(
            {"params": teacher.params}, tokens, mask, layer, method="hidden_and_layer"
        )
    )
    rms = student[0].config.block_decoder.norm == "rms"
    if teacher.model.config.tied_classifier:
        classifier = np.asarray(teacher.params["embed"]["embedding"], np.float64).T
    else:
        classifier = np.asarray(teacher.params["classifier"]["kernel"], np.float64)

    def before(row: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Final logits and hidden state at the last real token of the first `end` of a row."""
        seen = mask[row].reshape(-1) & (np.arange(24) < end)
        text = np.where(seen, tokens[row].reshape(-1), 7)  # what is hidden does not matter
        last = np.flatnonzero(seen)[-1]
        final, hidden = read(text[None], seen[None])
        return np.asarray(final[0, last], np.float64) @ classifier, np.asarray(hidden[0, last])

    for row in range(3):
        for block in range(1, 6):
            if not mask[row, :block].any() or not mask[row, block].any():
                continue
            hidden = before(row, block * 4)[1].astype(np.float64)
            hidden -= 0 if rms else hidden.mean()
            hidden /= np.sqrt((hidden**2).mean() + 1e-5)
            sums["hidden_loss"] += ((contexts[row, block - 1] - hidden) ** 2).mean()
            for place in np.flatnonzero(mask[row, block]):
                ours = logits[row, block - 1, place]
                theirs = before(row, block * 4 + int(place))[0]
                p, q = log_softmax(theirs / temperature), log_softmax(ours / temperature)
                sums["kl_loss"] += (np.exp(p) * (p - q)).sum()
                sums["loss"] -= log_softmax(ours)[tokens[row, block, place]]
    return sums


@pytest.mark.parametrize(
    ("family", "temperature", "layer", "tokens_at_once"),
    [("neox", 1.0, 2, 4096), ("neox", 2.5, 1, 12), ("llama", 1.0, 3, 12)],
)
def test_sums_equal_those_computed_token_by_token(
    family, temperature, layer, tokens_at_once, batch, monkeypatch
):
    student, teacher = random_student(family), random_teacher(family)
    monkeypatch.setattr(module, "_TOKENS", tokens_at_once)
    config = distill(temperature=temperature, hidden_layer=layer, stages=(ALL,))
    got = sums_of(*student, teacher, batch, config)
    wanted = by_hand(student, teacher, batch, temperature, layer)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, err_msg=name)


def test_leading_padding_changes_nothing_for_the_teacher(teacher, batch):
    rng = np.random.default_rng(2)
    text = rng.integers(2, 24, 21).astype(np.int32)
    forward = jax.jit(teacher.model.apply)
    bare = np.asarray(forward({"params": teacher.params}, text[None], np.ones((1, 21), bool)))[0]
    padded = np.concatenate([[1, 1, 1], text]).astype(np.int32).reshape(1, 6, 4)
    mask = (np.arange(24) >= 3).reshape(1, 6, 4)
    tokens, log_probs = jax.jit(lambda: top_log_probs(teacher, padded, mask, 24, 1.0))()
    found = np.take_along_axis(
        np.asarray(log_probs), np.argsort(np.asarray(tokens), axis=-1), axis=-1
    ).reshape(20, 24)
    # Token 4 of the row is token 1 of the text, which follows from token 0.
    np.testing.assert_allclose(found, log_softmax(bare[:20]), atol=1e-4)


def test_gradients_of_slices_are_those_of_the_whole(student, teacher, batch, monkeypatch):
    model, params = student
    config = distill(stages=(ALL,))

    def gradient(params):
        return jax.grad(lambda p: sum(sums_of(model, p, teacher, batch, config).values()))(params)

    whole = gradient(params)
    monkeypatch.setattr(module, "_TOKENS", 12)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3),
        gradient(params),
        whole,
    )


def test_no_gradient_reaches_the_teacher(student, teacher, batch):
    def loss(params):
        frozen = Teacher(params, teacher.model)
        config = distill(stages=(ALL,))
        return sum(sums_of(*student, frozen, batch, config).values())

    assert all((x == 0).all() for x in jax.tree.leaves(jax.grad(loss)(teacher.params)))


@pytest.mark.parametrize("family", STACKS)
def test_partitioned_teacher_has_no_hidden_loss_with_blocks_of_one_token(family, batch):
    teacher = random_teacher(family)
    config, params = uptrain(
        teacher.model.config, teacher.params, method="partition", block_length=1, block_layers=2
    )
    flat = {name: x[:1].reshape(1, 24, 1) for name, x in batch.items()}  # without padding
    settings = distill(stages=(ALL,))
    sums = sums_of(build(config), params, teacher, flat, settings)
    assert sums["hidden_loss"] < 1e-6
    assert sums["kl_loss"] > 1e-2


def test_top_k_bounds_the_divergence_from_below_and_meets_it(student, teacher, batch):
    config = distill(temperature=1.5)
    full = sums_of(*student, teacher, batch, config)["kl_loss"]
    found = []
    for k in (1, 23, 24):
        tokens, log_probs = jax.jit(
            lambda k=k: top_log_probs(teacher, batch["tokens"], batch["mask"], k, 1.5)
        )()
        part = batch | {"teacher_tokens": tokens, "teacher_log_probs": log_probs}
        found.append(float(sums_of(*student, None, part, config)["kl_loss"]))
    assert (np.diff(found) > -1e-3).all()
    assert 0 < found[0] < 0.9 * float(full)
    np.testing.assert_allclose(found[1:], full, rtol=1e-4)  # with 23 of 24 the rest is one token


def step_config(**settings) -> RunConfig:
    optimizer = OptimizerConfig(learning_rate=1e-2, multipliers=settings.pop("multipliers", ()))
    return RunConfig(
        model=STUDENT,
        optimizer=optimizer,
        training=TrainingConfig(batch_size=3, steps=4, **settings.pop("training", {})),
        distill=distill(**settings),
    )


def changes(config: RunConfig, teacher, batch, stage: int = 0):
    model = build(STUDENT)
    state = create_state(config, model)
    before = jax.device_get(state.params)
    state, metrics = train_step(state, batch, config, model, teacher, stage)
    return jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, before), metrics


def test_stages_freeze_and_scale_by_pattern(teacher, batch):
    stage = StageConfig(
        steps=2, hidden_weight=1.0, multipliers=((".*/stack/layers/.*", 0), ("embedder/.*", 0.5))
    )
    both, one = (
        changes(step_config(stages=stages), teacher, batch)[0] for stages in ((ALL,), (stage, ALL))
    )
    for decoder in ("block_decoder", "token_decoder"):
        assert all((x == 0).all() for x in jax.tree.leaves(one[decoder]["stack"]["layers"]))
        assert all((x != 0).any() for x in jax.tree.leaves(both[decoder]["stack"]["layers"]))
    # Adam's first update depends on the gradient's sign, up to epsilon.
    half = one["embedder"]["tokens"]["embedding"]
    whole = both["embedder"]["tokens"]["embedding"]
    moved = np.abs(whole) > 5e-3
    assert moved.any()
    np.testing.assert_allclose(half[moved], 0.5 * whole[moved], rtol=0.05)
    assert (np.abs(one["token_decoder"]["classifier"]["kernel"]) > 5e-3).any()


def test_multipliers_work_without_distillation(batch):
    config = RunConfig(
        model=STUDENT,
        optimizer=OptimizerConfig(multipliers=(("embedder/.*", 0.0),)),
        training=TrainingConfig(batch_size=3, steps=4),
    )
    moved, _ = changes(config, None, batch)
    assert all((x == 0).all() for x in jax.tree.leaves(moved["embedder"]))
    assert (moved["token_decoder"]["classifier"]["kernel"] != 0).any()


def test_microbatches_give_the_same_step(teacher, batch):
    twice = {name: np.concatenate([x, x[::-1]]) for name, x in batch.items()}
    got = []
    for parts in (1, 2):
        config = step_config(stages=(ALL,))
        training = TrainingConfig(batch_size=6, steps=4, microbatches=parts)
        _, metrics = changes(dataclasses.replace(config, training=training), teacher, twice)
        got.append({name: float(x) for name, x in metrics.items()})
    assert {"loss", "kl_loss", "hidden_loss"} <= got[0].keys()
    assert got[0] == pytest.approx(got[1], rel=1e-4)


@pytest.mark.parametrize(
    ("patterns", "why"),
    [
        ((("decoder/.*", 0.0),), r"stages\[0\].multipliers: 'decoder/\.\*' has no effect, it matc"),
        (((".*", 0.5), ("embedder/.*", 0.0)), "its parameters all match earlier patterns"),
        (((".*", 0.0),), "all parameters are frozen"),
    ],
)
def test_patterns_without_effect_are_named(patterns, why):
    params = jax.eval_shape(lambda: init_params(build(STUDENT), jax.random.key(0)))
    config = step_config(stages=(StageConfig(multipliers=patterns),))
    with pytest.raises(ValueError, match=why):
        multipliers(params, config, 0)


# Runs.

SOURCE = VanillaConfig(vocab_size=300, context_length=32, decoder=MODEL.block_decoder)
TWO = (
    StageConfig(
        steps=3,
        cross_entropy_weight=0.0,
        hidden_weight=1.0,
        multipliers=(("(block|token)_decoder/stack/layers/.*", 0.0),),
    ),
    StageConfig(cross_entropy_weight=0.0),
)


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("source") / "run"
    train(dataclasses.replace(run_config(data, steps=2), model=SOURCE), workdir)
    return workdir


def run(data, source, **settings) -> RunConfig:
    training = dict(steps=6, checkpoint_every=2) | settings.pop("training", {})
    settings = dict(teacher=str(source), stages=TWO) | settings
    return dataclasses.replace(run_config(data, **training), distill=DistillConfig(**settings))


@pytest.fixture(scope="module")
def distilled(data, source, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("distilled") / "run"
    config = run(data, source)
    return config, workdir, train(config, workdir)


def test_stages_follow_each_other_in_a_run(distilled):
    _, workdir, _ = distilled
    lines = [line for line in read(workdir) if "train/loss" in line]
    assert [("train/hidden_loss" in line, "train/kl_loss" in line) for line in lines] == [
        *[(True, True)] * 3,
        *[(False, True)] * 3,
    ]
    assert lines[-1]["train/kl_loss"] < lines[0]["train/kl_loss"]


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_is_exact_in_each_stage(distilled, tmp_path, step):
    config, workdir, wanted = distilled
    shutil.copytree(workdir, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    if not any((tmp_path / "run" / "checkpoints").iterdir()):
        pytest.skip("the checkpoint is not kept")
    got = train(config, tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, got.params, wanted.params)
    jax.tree.map(np.testing.assert_array_equal, got.opt_state, wanted.opt_state)


def test_checkpoints_hold_the_student_alone(distilled, finished):
    sizes = [
        sum(f.stat().st_size for f in (workdir / "checkpoints").rglob("*") if f.is_file())
        / len(list((workdir / "checkpoints").iterdir()))
        for workdir in (distilled[1], finished[1])
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def other_model(**fields):
    return lambda config: dataclasses.replace(
        config, model=dataclasses.replace(config.model, **fields)
    )


def other_distill(**fields):
    return lambda config: dataclasses.replace(
        config, distill=dataclasses.replace(config.distill, **fields)
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_model(vocab_size=301), "vocab_size 300, config.model.vocab_size 301"),
        (other_model(context_length=64), "context_length 32 is below .*context_length 64"),
        (other_distill(hidden_layer=2), "hidden_layer: 2 is more than the teacher's 1 layers"),
        (
            other_model(block_decoder=StackConfig(layers=1, width=64, heads=4)),
            "context embeddings of width 64 .* hidden states of width 32",
        ),
        (
            other_distill(stages=(StageConfig(multipliers=(("nothing", 0.0),)),)),
            r"config.distill.stages\[0\].multipliers: 'nothing' has no effect",
        ),
        (other_distill(cache="nowhere", stages=(StageConfig(),)), "holds no manifest.json"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(data, source, tmp_path, change, why):
    with pytest.raises(ValueError, match=why):
        train(change(run(data, source)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_teacher_must_be_vanilla_and_there(data, finished, tmp_path):
    with pytest.raises(ValueError, match="is a block model, must be vanilla"):
        train(run(data, finished[1]), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        train(run(data, tmp_path / "none"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_teacher_must_know_the_tokenizer(data, source, tmp_path):
    (tmp_path / "other").mkdir()
    for name in "ab":
        (tmp_path / "other" / f"{name}.txt").write_text("zebra quagga okapi " * 300)
    words = dataclasses.replace(data, source=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"trained with another tokenizer .*tokenizer\.json"):
        train(run(words, source), tmp_path / "run")
    shutil.copytree(source, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="a newly trained tokenizer cannot be the teacher's"):
        train(run(data, tmp_path / "bare"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_cached_teacher_trains_the_same_student(data, source, tmp_path):
    config = run(
        data, source, stages=(StageConfig(cross_entropy_weight=0.0),), training=dict(steps=3)
    )
    cache = tmp_path / "cache"
    write_cache(config, cache, 300)
    cached = other_distill(cache=str(cache))(config)
    losses = []
    for name, one in (("teacher", config), ("cached", cached)):
        train(one, tmp_path / name)
        losses.append(
            [line["train/kl_loss"] for line in read(tmp_path / name) if "train/kl_loss" in line]
        )
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)  # float16 in the cache


def test_cache_goes_on_and_belongs_to_one_run(data, source, tmp_path):
    config = run(data, source, stages=(StageConfig(),), training=dict(steps=2))
    cache = tmp_path / "cache"
    write_cache(config, cache, 4)
    files = sorted(cache.glob("*.npz"))
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    untouched = files[1].stat().st_mtime_ns
    cached = other_distill(cache=str(cache))(config)
    with pytest.raises(ValueError, match="lacks 1 of 2 steps, step 0 first"):
        train(cached, tmp_path / "run")
    write_cache(config, cache, 4)
    assert [file.read_bytes() for file in files] == before
    assert files[1].stat().st_mtime_ns == untouched
    with pytest.raises(ValueError, match="top_k: cached 4, now 5"):
        write_cache(config, cache, 5)
    with pytest.raises(ValueError, match=r"config\.seed: cached 0, now 1"):
        train(dataclasses.replace(cached, seed=1), tmp_path / "run")
    hotter = other_distill(temperature=2.0)(cached)
    with pytest.raises(ValueError, match=r"config\.distill\.temperature: cached 1\.0, now 2\.0"):
        train(hotter, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    files[1].write_bytes(before[1][:100])
    with pytest.raises(ValueError, match=r"00000001.npz: cannot be read .*cache_teacher.py again"):
        train(cached, tmp_path / "run")


@pytest.mark.slow
def test_sharded_distillation_equals_that_of_one_device():
    losses = eight_devices.run("distillation")
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["one device"], rtol=2e-4, err_msg=name)


@pytest.mark.slow
def test_configurations_of_the_experiment(tmp_path, monkeypatch, data, source, convert):
    spec = importlib.util.spec_from_file_location("distill", ROOT / "configs" / "distill.py")
    configs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(configs)
    for kind in configs.KINDS:
        run = from_config_dict(configs.get_config(f"{kind}:3"))
        assert run.seed == 3
        assert bool(run.distill.teacher) == (kind == "distilled")
    logits = from_config_dict(configs.get_config("logits:3"))
    dataclasses.replace(logits.distill, cache="folder")  # valid with a cache
    with pytest.raises(ValueError, match="distilled:0, or START:TEACHER"):
        configs.get_config("runs/none:0")

    start = tmp_path / "start"
    method = ["--method=duplicate", "--block-length=4"]
    convert("uptrain", f"--from={source}", *method, f"--output={start}")
    run = from_config_dict(configs.get_config(f"{start}:{source}"))
    assert run.distill.teacher == str(source)
    assert run.training.init_from == str(start)
    check_distillation(run, create_mesh(run.mesh))
    run = from_config_dict(configs.get_config(f"{start}:{source}:50"))
    assert (run.training.steps, run.distill.stages[0].steps) == (50, 10)
