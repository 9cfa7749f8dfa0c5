r"""Tokenize text into shards, once, for training by index.

    python launch/prepare.py --source='pile/*.jsonl.zst' --tokenizer=EleutherAI/pythia-70m \
        --output=gs://bucket/pile
    python launch/train.py ... --config.data.source=prepared:gs://bucket/pile

On several hosts, each runs the command with a --task of its own, such as 0/8 to 7/8. A command
that was interrupted is given again, and continues. It ends with 0 when its work is done; 1: an
error that somebody must look at; 2: a mistake in the flags.
"""

import os
import re

from absl import flags

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Text, JSON Lines, Parquet, ArrayRecord and Megatron files, folders or patterns, local or "
    "gs://; package:NAME, hub:NAME[:CONFIG][:SPLIT], synthetic:TOKENS. Several are separated by "
    "commas.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "The path of a tokenizer.json, a name on the hub, or train (on the source)."
)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write, local or gs://.")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The field or column that holds the text.")
_END_TOKEN = flags.DEFINE_string("end_token", "<|endoftext|>", "The token after every document.")
_PAD_TOKEN = flags.DEFINE_string("pad_token", "<|padding|>", "The token of padding.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 50304, "The most ids, with --tokenizer=train.")
_HOLDOUT_EVERY = flags.DEFINE_integer(
    "holdout_every", 20, "With --tokenizer=train, the tokenizer sees no n-th document; 0: sees all."
)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes.", lower_bound=1)
_TASK = flags.DEFINE_string("task", "0/1", "I/N: this host's number, from 0, of N that share.")
_PART_MEGABYTES = flags.DEFINE_integer(
    "part_megabytes", 256, "Input for a shard; files that can be split are.", lower_bound=1
)
_SKIP_BAD = flags.DEFINE_integer(
    "skip_bad", 0, "How many documents that cannot be read are left out.", lower_bound=0
)


def _task() -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", _TASK.value)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(
            f"--task: got {_TASK.value!r}, expected I/N with I from 0 to N-1, as in 0/8"
        )
    return int(match[1]), int(match[2])


def main() -> None:
    from blocktx.data import Tokenizer, parse_sources, prepare_folder, train_tokenizer
    from blocktx.files import writable_folder

    task = _task()
    sources = parse_sources(_SOURCE.value, "--source")
    if any(source.weight is not None for source in sources):
        raise ValueError(
            "--source: weights are for training; prepare each source into a folder of its own, and "
            "train with --config.data.source=prepared:A@0.7,prepared:B@0.3"
        )
    specs = [source.spec for source in sources]
    if any(spec.startswith("prepared:") for spec in specs):
        raise ValueError(f"--source: {_SOURCE.value!r} is prepared already")
    output = writable_folder("--output", _OUTPUT.value)
    special = (_END_TOKEN.value, _PAD_TOKEN.value)
    if _TOKENIZER.value != "train":
        tokenizer = Tokenizer.load(_TOKENIZER.value, *special)
    elif (output / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(output / "tokenizer.json", *special)
    else:
        tokenizer = train_tokenizer(
            specs, _TEXT_FIELD.value, _HOLDOUT_EVERY.value, _VOCAB_SIZE.value, *special
        )
        tokenizer.save(output / "tokenizer.json")
    manifest = prepare_folder(
        specs,
        tokenizer,
        output,
        text_field=_TEXT_FIELD.value,
        workers=_WORKERS.value,
        task=task,
        part_bytes=_PART_MEGABYTES.value << 20,
        skip_bad=_SKIP_BAD.value,
    )
    if manifest is None:
        print(f"task {_TASK.value} is done; the last task to end finishes {output}")
        return
    shards = len(manifest.shards)
    print(
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens of {manifest.text_bytes:,} "
        f"bytes in {shards} {'shard' if shards == 1 else 'shards'}"
    )
    if manifest.bad_count:
        print(
            f"{manifest.bad_count:,} bad documents were skipped; {output}/manifest.json lists them"
        )
    print(f"train with --config.data.source=prepared:{output}")


if __name__ == "__main__":
    # Not above: the processes that main starts import this file, and need no JAX.
    from blocktx import command_line

    command_line.run(
        main,
        required=("source", "tokenizer", "output"),
        flag_of={"config.data.source": "--source", "config.data.tokenizer": "--tokenizer"},
    )
