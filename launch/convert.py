r"""Bring models of other code here, and take them back.

    python launch/convert.py official --checkpoint=DIR_OR_FILE --output=runs/block
    python launch/convert.py neox --checkpoint=EleutherAI/pythia-70m --output=runs/pythia
    python launch/convert.py to-official --checkpoint=runs/block --output=DIR
    python launch/convert.py to-neox --checkpoint=runs/pythia --output=DIR

Turn a vanilla model into a block model, and make the blocks of one longer, to train on from there:

    python launch/convert.py uptrain --from=runs/pythia --method=partition --block-length=4 \
        --output=runs/start
    python launch/convert.py lengthen --from=runs/block --factor=2 --output=runs/start

`COMMAND --help` tells what each one takes.
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import sys
from typing import NoReturn, get_args

import blocktx.convert
from blocktx import checkpoint
from blocktx.config import DataConfig, RunConfig, from_config_dict
from blocktx.convert.tensors import DTYPES, check_new, open_checkpoint
from blocktx.convert.uptrain import Method, lengthen, uptrain
from blocktx.data.tokenizer import Tokenizer
from blocktx.model import Model, build, count_params


def _import(args: argparse.Namespace) -> None:
    """For official and neox: their checkpoint -> a run folder of ours."""
    check_new(args.output)
    given = _read_config(args.config) if args.config else None
    load = (
        blocktx.convert.load_official if args.command == "official" else blocktx.convert.load_neox
    )
    model, params = load(args.checkpoint, given and given.model)
    data = given.data if given else DataConfig()
    tokenizer = args.tokenizer or _tokenizer_beside(args.checkpoint)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, data, model)
    checkpoint.save_params(
        args.output, RunConfig(model=model.config, data=data), params, tokenizer=tokenizer
    )
    _report(model, args.output)
    if tokenizer is not None:
        print(f"python launch/generate.py --checkpoint={args.output} --prompt='...'")
    else:
        print("launch/generate.py needs a --tokenizer, too; without, there is")
        print(f"python -c 'from blocktx.checkpoint import *; load_params(\"{args.output}\")'")


def _export(args: argparse.Namespace) -> None:
    """For to-official and to-neox: a run folder or checkpoint of ours -> their files."""
    check_new(args.output)
    run = checkpoint.load_params(args.checkpoint)
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


def _uptrain(args: argparse.Namespace) -> None:
    """Of uptrain and lengthen: a run or checkpoint of ours -> one for another run to begin with."""
    check_new(args.output)
    run = checkpoint.load_params(args.source)
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
    checkpoint.save_params(
        args.output,
        dataclasses.replace(run.config, model=model),
        params,
        tokenizer=_tokenizer_of(run),
    )
    _report(build(model), args.output)
    print(
        f"python launch/train.py --config=configs/uptrain.py:{args.output} "
        f"--workdir={args.output.rstrip('/')}-trained"
    )


def _tokenizer_of(run: checkpoint.Checkpoint) -> pathlib.Path | None:
    beside = pathlib.Path(run.path).parent.parent / "tokenizer.json"
    return beside if beside.exists() else None


def _read_config(spec: str) -> RunConfig:
    """The run that `FILE.py` or `FILE.py:NAME` describes."""
    path, _, name = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return from_config_dict(module.get_config(name) if name else module.get_config())


def _tokenizer_beside(path: str) -> pathlib.Path | None:
    folder = open_checkpoint(path).path
    beside = (folder if folder.is_dir() else folder.parent) / "tokenizer.json"
    return beside if beside.exists() else None


def _check_tokenizer(path: str | pathlib.Path, data: DataConfig, model: Model) -> None:
    tokens = Tokenizer.load(path, data.end_token, data.pad_token).vocab_size
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--tokenizer: {path} is not a tokenizer.json file")
    if tokens > model.config.vocab_size:
        raise ValueError(
            f"{path}: has {tokens} tokens, more than the {model.config.vocab_size} of the model"
        )


def _report(model: Model, output: str) -> None:
    total, inner = count_params(model.config)
    print(
        f"{model.config.kind} model, {total / 1e6:.1f}M parameters "
        f"({inner / 1e6:.1f}M without embeddings): {output}"
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
        "official": ("the authors' Block Transformer -> a run of ours", "or .safetensors file"),
        "neox": ("GPT-NeoX or Pythia -> a vanilla run of ours", ".safetensors file or hub name"),
    }
    for name, (summary, kinds) in theirs.items():
        command = add(name, _import, summary)
        command.add_argument("--checkpoint", required=True, help=f"folder {kinds}")
        command.add_argument(
            "--config", help="configs/FILE.py:NAME, for what the files do not tell"
        )
        command.add_argument("--tokenizer", help="its tokenizer.json; default: the one beside it")
    for name in ("official", "neox"):
        command = add(f"to-{name}", _export, f"a run of ours -> files for {name}")
        command.add_argument("--checkpoint", required=True, help="a run's folder or one step's")
        command.add_argument("--dtype", choices=DTYPES.values(), default="float32")

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
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
