r"""Bring models of other code here, and take them back.

    python launch/convert.py official --checkpoint=DIR_OR_FILE --output=runs/block
    python launch/convert.py neox --checkpoint=EleutherAI/pythia-70m --output=runs/pythia
    python launch/convert.py to-official --checkpoint=runs/block --output=DIR
    python launch/convert.py to-neox --checkpoint=runs/pythia --output=DIR

Write a run as one safetensors file with our names, for any framework and for all that reads a run:

    python launch/convert.py to-safetensors --checkpoint=runs/block --output=DIR

Turn a vanilla model into a block model, and make the blocks of one longer, to train on from there:

    python launch/convert.py uptrain --from=runs/pythia --method=partition --block-length=4 \
        --output=runs/start
    python launch/convert.py lengthen --from=runs/block --factor=2 --output=runs/start

`COMMAND --help` tells what each one takes.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
from typing import NoReturn, get_args

import blocktx.convert
from blocktx.checkpoint import Checkpoint, is_ours, load_params, save_params, tokenizer_file, write
from blocktx.command_line import read_config
from blocktx.config import DataConfig, RunConfig
from blocktx.convert import DTYPES, Method, check_new, lengthen, open_checkpoint, uptrain
from blocktx.cost import count_params
from blocktx.data import Tokenizer
from blocktx.model import Model, build


def _import(args: argparse.Namespace) -> None:
    """For official and neox: their checkpoint -> a run folder of ours."""
    check_new(args.output)
    given = read_config(args.config) if args.config else None
    data = given.data if given else DataConfig()
    tokenizer = args.tokenizer or _tokenizer_beside(args.checkpoint)
    known = tokenizer and _read_tokenizer(tokenizer, data, asked_for=bool(args.tokenizer))
    load = (
        blocktx.convert.load_official if args.command == "official" else blocktx.convert.load_neox
    )
    model, params = load(args.checkpoint, given and given.model)
    if not (known and _fits(known, tokenizer, model, asked_for=bool(args.tokenizer))):
        tokenizer = None
    save_params(args.output, RunConfig(model=model.config, data=data), params, tokenizer=tokenizer)
    _report(model, args.output)
    tokens = "" if tokenizer else " --tokenizer=tokenizer.json"
    print(f"python launch/generate.py --checkpoint={args.output}{tokens} --prompt='...'")


def _export(args: argparse.Namespace) -> None:
    """For to-official and to-neox: a run folder or checkpoint of ours -> their files."""
    check_new(args.output)
    run = load_params(args.checkpoint)
    model = build(run.config.model)
    official = args.command == "to-official"
    convert = blocktx.convert.to_official if official else blocktx.convert.to_neox
    tensors, config = convert(model, run.params, args.dtype)
    blocktx.convert.save_folder(args.output, tensors, config, tokenizer=_tokenizer_of(run))
    _report(model, args.output)
    if official:
        print("model.safetensors and official.yaml are what the authors' code loads")
    else:
        print(f"transformers.AutoModelForCausalLM.from_pretrained({args.output!r})")


def _to_safetensors(args: argparse.Namespace) -> None:
    check_new(args.output)
    run = load_params(args.checkpoint)
    write(args.output, run.params, run.config, step=run.step, tokenizer=_tokenizer_of(run))
    _report(build(run.config.model), args.output)
    print(f"blocktx.load({args.output!r}), or safetensors alone; config.json describes the run")


def _uptrain(args: argparse.Namespace) -> None:
    """Of uptrain and lengthen: a run or checkpoint of ours -> one for another run to begin with."""
    check_new(args.output)
    _check_ours(args.source, "neox" if args.command == "uptrain" else "official")
    run = load_params(args.source)
    try:
        if args.command == "uptrain":
            model, params = uptrain(
                run.config.model,
                run.params,
                method=args.method,
                block_length=args.block_length,
                block_layers=args.block_layers,
                prefix_length=args.prefix_length,
            )
        else:
            model, params = lengthen(run.config.model, run.params, args.factor)
    except ValueError as error:
        raise ValueError(_with_flags(str(error))) from error
    tokenizer = _tokenizer_of(run)
    save_params(
        args.output, dataclasses.replace(run.config, model=model), params, tokenizer=tokenizer
    )
    _report(build(model), args.output)
    more = ""
    if tokenizer is None:
        print(
            f"no tokenizer.json in {args.source}; TOKENIZER has to be the one it was trained with"
        )
        more = " --config.data.tokenizer=TOKENIZER"
    print(
        f"python launch/train.py --config=configs/uptrain.py:{args.output} "
        f"--workdir={args.output.rstrip('/')}-trained{more}"
    )


def _with_flags(message: str) -> str:
    """A message of uptrain or lengthen, with flags for the names of their arguments."""
    message = re.sub(r"^(method|factor):", r"--\1:", message, flags=re.MULTILINE)
    return re.sub(r"\b(block|prefix)_(length|layers)\b", r"--\1-\2", message)


def _check_ours(source: str, command: str) -> None:
    path = pathlib.Path(source).expanduser()
    foreign = path.is_file() or (
        path.is_dir() and any(path.glob("*.safetensors*")) and not (path / "checkpoints").exists()
    )
    if foreign and not is_ours(path):
        raise ValueError(
            f"--from: {source} is not a run of blocktx; bring it here first: "
            f"python launch/convert.py {command} --checkpoint={source} --output=..."
        )


def _tokenizer_of(run: Checkpoint) -> pathlib.Path | None:
    file = tokenizer_file(run.path)
    return pathlib.Path(file) if file.exists() else None


def _tokenizer_beside(path: str) -> pathlib.Path | None:
    folder = open_checkpoint(path).path
    beside = (folder if folder.is_dir() else folder.parent) / "tokenizer.json"
    return beside if beside.exists() else None


def _read_tokenizer(
    path: str | pathlib.Path, data: DataConfig, *, asked_for: bool
) -> Tokenizer | None:
    """What is in the file; None, and a line printed, if it is unusable and nobody asked for it."""
    try:
        if not pathlib.Path(path).expanduser().is_file():
            raise ValueError(f"{path} is not a tokenizer.json file")
        return Tokenizer.load(path, data.end_token, data.pad_token)
    except (ValueError, OSError) as error:
        problem = str(error).removeprefix("config.data.tokenizer: ")
        return _refuse_or_skip(path, problem, asked_for)


def _fits(tokenizer: Tokenizer, path: str | pathlib.Path, model: Model, *, asked_for: bool) -> bool:
    tokens, rows = tokenizer.vocab_size, model.config.vocab_size
    if tokens <= rows:
        return True
    _refuse_or_skip(
        path, f"{path} has {tokens} tokens, more than the {rows} of the model", asked_for
    )
    return False


def _refuse_or_skip(path: str | pathlib.Path, problem: str, asked_for: bool) -> None:
    if asked_for:
        raise ValueError(f"--tokenizer: {problem}")
    print(f"left out {path}: {problem.removeprefix(str(path)).lstrip()}")


def _report(model: Model, output: str) -> None:
    counted = count_params(model.config)
    print(
        f"{model.config.kind} model, {counted.total / 1e6:.1f}M parameters "
        f"({counted.non_embedding / 1e6:.1f}M without embeddings): {output}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("--output", required=True, help="a folder that does not exist yet")
        return command

    theirs = {
        "official": "the authors' Block Transformer -> a run of ours",
        "neox": "GPT-NeoX or Pythia -> a vanilla run of ours",
    }
    for name, summary in theirs.items():
        command = add(name, _import, summary)
        command.add_argument(
            "--checkpoint", required=True, help="folder, .safetensors file or hub name"
        )
        command.add_argument(
            "--config", help="configs/FILE.py:NAME, for what the files do not tell"
        )
        command.add_argument("--tokenizer", help="its tokenizer.json; default: the one beside it")
    for name in ("official", "neox"):
        command = add(f"to-{name}", _export, f"a run of ours -> files for {name}")
        command.add_argument("--checkpoint", required=True, help="a run's folder or one step's")
        command.add_argument("--dtype", choices=DTYPES.values(), default="float32")

    command = add("to-safetensors", _to_safetensors, "a run of ours -> one safetensors file")
    command.add_argument("--checkpoint", required=True, help="a run's folder or one step's")

    command = add("uptrain", _uptrain, "a vanilla run of ours -> the start of a block run")
    command.add_argument("--method", choices=get_args(Method), required=True)
    command.add_argument("--block-length", type=int, default=4)
    command.add_argument(
        "--block-layers", type=int, help="of the block decoder, for partition; default: half"
    )
    command.add_argument("--prefix-length", type=int, default=2)
    source = dict(dest="source", required=True, help="a run's folder or one step's")
    command.add_argument("--from", **source)
    command = add("lengthen", _uptrain, "a block run of ours -> the start of one of longer blocks")
    command.add_argument("--factor", type=int, default=2)
    command.add_argument("--from", **source)
    return parser


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args([_with_dashes(arg) for arg in given])
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        _fail(str(error))


def _with_dashes(arg: str) -> str:
    """--block_length=4, as the other scripts spell their flags, as --block-length=4."""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
