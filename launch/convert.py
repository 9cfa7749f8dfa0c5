r"""Convert models of other code to runs of blocktx, and back.

    python launch/convert.py hf --checkpoint=HuggingFaceTB/SmolLM2-135M --output=runs/smollm2
    python launch/convert.py official --checkpoint=DIR_OR_FILE --output=runs/block
    python launch/convert.py to-hf --checkpoint=runs/smollm2 --output=DIR
    python launch/convert.py to-official --checkpoint=runs/block --output=DIR

`hf` takes Llama, SmolLM2, Mistral, Qwen2.5, Qwen3, GPT-NeoX and Pythia; `neox` and `to-neox` are
older names of `hf` and `to-hf`. Give a run its tokenizer afterwards:

    python launch/convert.py add-tokenizer --checkpoint=runs/block --tokenizer=tokenizer.json \
        --output=runs/block-with-tokenizer

Write a run as one safetensors file with the names of blocktx, for any framework:

    python launch/convert.py to-safetensors --checkpoint=runs/block --output=DIR

Turn a vanilla model into a block model, and make its blocks longer, to train on from there:

    python launch/convert.py uptrain --from=runs/smollm2 --method=partition --block-length=4 \
        --output=runs/start
    python launch/convert.py lengthen --from=runs/block --factor=2 --output=runs/start

`COMMAND --help` lists the flags of a command.
"""

import argparse
import dataclasses
import pathlib
import re
import shlex
import sys
from typing import NoReturn, get_args

import blocktx.convert
from blocktx.checkpoint import (
    Checkpoint,
    is_ours,
    load_params,
    load_tokenizer,
    save_params,
    tokenizer_file,
    write,
)
from blocktx.command_line import read_config
from blocktx.config import DataConfig, RunConfig
from blocktx.convert import DTYPES, MeanEmbedder, Method, check_new, lengthen, uptrain
from blocktx.cost import count_params
from blocktx.data import Tokenizer, read_tokenizer_files
from blocktx.model import Model, build
from blocktx.parallel import choose_backend

_NO_TOKENIZER = "none"  # of --tokenizer


def _import(args: argparse.Namespace) -> None:
    """Run official and hf: a checkpoint of other code -> a run folder."""
    check_new(args.output)
    given = read_config(args.config) if args.config else None
    official = args.command == "official"
    load = blocktx.convert.load_official if official else blocktx.convert.load_hf
    problems, model, tokenizer = [], None, None
    file = args.tokenizer or _tokenizer_beside(args.checkpoint)
    if file not in (None, _NO_TOKENIZER):
        try:
            tokenizer = _read_tokenizer(file, args.end_token, given)
        except (ValueError, OSError) as error:
            problems.append(f"--tokenizer: {_without_field(error)}{_hint(args)}")
    try:
        model, params = load(
            args.checkpoint, given and given.model, allow_nonfinite=args.allow_nonfinite
        )
    except ValueError as error:
        problems.append(str(error))
    if model is not None and tokenizer is not None:
        problems += [
            f"--tokenizer: {line}{_hint(args)}" for line in _misfit(tokenizer, file, model)
        ]
    if problems:
        raise ValueError("\n".join(problems))
    data = _data(given.data if given else DataConfig(), tokenizer)
    config = RunConfig(model=model.config, data=data)
    save_params(
        args.output,
        config,
        params,
        tokenizer=file if tokenizer else None,
        allow_nonfinite=args.allow_nonfinite,
    )
    _report(model, args.output)
    if tokenizer:
        _print_generate(args.output)
    else:
        _print_add_tokenizer(args.output)


def _export(args: argparse.Namespace) -> None:
    """Run to-official and to-hf: a run or checkpoint -> files of other code."""
    check_new(args.output)
    run = load_params(args.checkpoint, allow_nonfinite=args.allow_nonfinite)
    model = build(run.config.model)
    official = args.command == "to-official"
    convert = blocktx.convert.to_official if official else blocktx.convert.to_hf
    tensors, config = convert(model, run.params, args.dtype, allow_nonfinite=args.allow_nonfinite)
    file = _tokenizer_of(run)
    if file and not official:
        config |= _token_ids(load_tokenizer(run))
    more = read_tokenizer_files(file) if file else {}
    blocktx.convert.save_folder(args.output, tensors, config, more)
    _report(model, args.output)
    if official:
        print("the authors' code loads model.safetensors and official.yaml; the tensor")
        print("block_decoder.gpt_neox.embed_in.weight, which it never uses, is written as zeros")
    else:
        print(f"transformers.AutoModelForCausalLM.from_pretrained({args.output!r})")


def _to_safetensors(args: argparse.Namespace) -> None:
    check_new(args.output)
    run = load_params(args.checkpoint)
    write(args.output, run.params, run.config, step=run.step, tokenizer=_tokenizer_of(run))
    _report(build(run.config.model), args.output)
    print(f"blocktx.load({args.output!r}), or safetensors alone; config.json describes the run")


def _add_tokenizer(args: argparse.Namespace) -> None:
    """Run add-tokenizer: a run or checkpoint and a tokenizer.json -> a run with that tokenizer."""
    check_new(args.output)
    run = load_params(args.checkpoint)
    tokenizer = _read_tokenizer(args.tokenizer, args.end_token, None)
    model = build(run.config.model)
    for problem in _misfit(tokenizer, args.tokenizer, model):
        raise ValueError(f"--tokenizer: {problem}")
    config = dataclasses.replace(run.config, data=_data(run.config.data, tokenizer))
    save_params(args.output, config, run.params, step=run.step, tokenizer=args.tokenizer)
    _report(model, args.output)
    _print_generate(args.output)


def _uptrain(args: argparse.Namespace) -> None:
    """Run uptrain and lengthen: a run or checkpoint -> the start of another run."""
    check_new(args.output)
    _check_ours(args.source, "hf" if args.command == "uptrain" else "official")
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
                token_layers=args.token_layers,
                embedder=args.embedder,
                seed=args.seed,
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
    output = args.output.rstrip("/")
    print(
        f"python launch/train.py --config={shlex.quote(f'configs/uptrain.py:{output}')} "
        f"--workdir={shlex.quote(f'{output}-trained')}{more}"
    )


def _with_flags(message: str) -> str:
    """Return a message of uptrain or lengthen with flags in place of argument names."""
    message = re.sub(r"^(method|factor|embedder):", r"--\1:", message, flags=re.MULTILINE)
    return re.sub(r"\b(block|prefix|token)_(length|layers)\b", r"--\1-\2", message)


def _check_ours(source: str, command: str) -> None:
    path = pathlib.Path(source).expanduser()
    foreign = path.is_file() or (
        path.is_dir() and any(path.glob("*.safetensors*")) and not (path / "checkpoints").exists()
    )
    if foreign and not is_ours(path):
        raise ValueError(
            f"--from: {source} is not a run of blocktx; convert it first: "
            f"python launch/convert.py {command} --checkpoint={source} --output=..."
        )


def _tokenizer_of(run: Checkpoint) -> pathlib.Path | None:
    file = tokenizer_file(run.path)
    return pathlib.Path(file) if file.exists() else None


def _tokenizer_beside(checkpoint: str) -> pathlib.Path | None:
    """Return the tokenizer.json beside a checkpoint, if there is one."""
    path = pathlib.Path(checkpoint).expanduser()
    if not path.exists():
        path = blocktx.convert.open_checkpoint(checkpoint).path  # of the hub
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    return file if file.exists() else None


def _read_tokenizer(
    file: str | pathlib.Path, end_token: str | None, given: RunConfig | None
) -> Tokenizer:
    """Return a tokenizer with the special tokens of the flag, of --config, or of its own files.

    Tokenizers that have the special tokens of this project's defaults, such as Pythia's, use them.
    """
    if not pathlib.Path(file).expanduser().is_file():
        raise ValueError(f"{file} is not a tokenizer.json file")
    if end_token or given:
        data = given.data if given else None
        pad_token = data and data.pad_token
        return Tokenizer.load(file, end_token or data.end_token, None if end_token else pad_token)
    default = DataConfig()
    try:
        return Tokenizer.load(file, default.end_token, default.pad_token)
    except ValueError:
        return Tokenizer.load(file)


def _data(data: DataConfig, tokenizer: Tokenizer | None) -> DataConfig:
    if tokenizer is None:
        return data
    return dataclasses.replace(data, end_token=tokenizer.end_token, pad_token=tokenizer.pad_token)


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """Return the fields of config.json that say which tokens are special."""
    ends = list(tokenizer.end_ids)
    return {
        "bos_token_id": next(iter(tokenizer.begin_ids), None),
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }


def _misfit(tokenizer: Tokenizer, file: str | pathlib.Path, model: Model) -> list[str]:
    tokens, rows = tokenizer.vocab_size, model.config.vocab_size
    return [f"{file} has {tokens} tokens, more than the {rows} of the model"] * (tokens > rows)


def _without_field(error: Exception) -> str:
    return str(error).removeprefix("config.data.tokenizer: ")


def _hint(args: argparse.Namespace) -> str:
    """Return the hint for a tokenizer that was found beside a checkpoint."""
    return "" if args.tokenizer else f"; --tokenizer={_NO_TOKENIZER} leaves it out"


def _print_generate(output: str) -> None:
    print(f"python launch/generate.py --checkpoint={shlex.quote(output)} --prompt='...'")


def _print_add_tokenizer(output: str) -> None:
    with_tokenizer = shlex.quote(f"{output.rstrip('/')}-with-tokenizer")
    print("no tokenizer.json; to generate text, add the one that the model was trained with:")
    print(
        f"python launch/convert.py add-tokenizer --checkpoint={shlex.quote(output)} "
        f"--tokenizer=TOKENIZER --output={with_tokenizer}"
    )


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

    def add(name: str, run, summary: str, **more) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False, **more
        )
        command.set_defaults(run=run)
        command.add_argument("--output", required=True, help="a folder that does not exist yet")
        return command

    def add_allow_nonfinite(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--allow-nonfinite", action="store_true", help="accept weights that are NaN or infinite"
        )

    end_token = dict(help="the token that ends a document; default: what the tokenizer's files say")
    theirs = {
        "official": ("the authors' Block Transformer -> a run", []),
        "hf": ("Llama, SmolLM2, Mistral, Qwen, GPT-NeoX or Pythia -> a vanilla run", ["neox"]),
    }
    for name, (summary, aliases) in theirs.items():
        command = add(name, _import, summary, aliases=aliases)
        command.add_argument(
            "--checkpoint", required=True, help="folder, .safetensors file or hub name"
        )
        command.add_argument("--config", help="configs/FILE.py:NAME, for what the files do not say")
        command.add_argument(
            "--tokenizer", help="its tokenizer.json, or none; default: the one beside it"
        )
        command.add_argument("--end-token", **end_token)
        add_allow_nonfinite(command)
    for name, dtype, aliases in (("official", "float32", []), ("hf", "auto", ["to-neox"])):
        command = add(f"to-{name}", _export, f"a run -> files for {name}", aliases=aliases)
        command.add_argument("--checkpoint", required=True, help="a run's folder or one step's")
        command.add_argument(
            "--dtype",
            choices=(*DTYPES.values(), "auto"),
            default=dtype,
            help=f"auto: the narrowest that loses nothing; default: {dtype}",
        )
        add_allow_nonfinite(command)

    command = add("to-safetensors", _to_safetensors, "a run -> one safetensors file")
    command.add_argument("--checkpoint", required=True, help="a run's folder or one step's")

    command = add("add-tokenizer", _add_tokenizer, "a run's parameters and a tokenizer -> a run")
    command.add_argument("--checkpoint", required=True, help="a run's folder or one step's")
    command.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    command.add_argument("--end-token", **end_token)

    command = add("uptrain", _uptrain, "a vanilla run -> the start of a block run")
    command.add_argument(
        "--method",
        choices=get_args(Method),
        required=True,
        help="all: every layer goes to the block decoder, the token decoder gets new ones",
    )
    command.add_argument("--block-length", type=int, default=4)
    command.add_argument(
        "--block-layers", type=int, help="of the block decoder, for partition; default: half"
    )
    command.add_argument("--token-layers", type=int, help="new layers, for all; default: 2")
    command.add_argument(
        "--embedder",
        choices=get_args(MeanEmbedder),
        default="projection",
        help="each starts at the mean of the tokens' embeddings; default: projection",
    )
    command.add_argument("--prefix-length", type=int, default=2)
    command.add_argument("--seed", type=int, default=0, help="of new layers")
    source = dict(dest="source", required=True, help="a run's folder or one step's")
    command.add_argument("--from", **source)
    command = add("lengthen", _uptrain, "a block run -> the start of one of longer blocks")
    command.add_argument("--factor", type=int, default=2)
    command.add_argument("--from", **source)
    return parser


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args([_with_dashes(arg) for arg in given])
    choose_backend()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        nonfinite = "NaN or infinite" in str(error)
        _fail(str(error) + "\n--allow-nonfinite accepts such weights" * nonfinite)


def _with_dashes(arg: str) -> str:
    """Return --block_length=4, as other scripts spell flags, as --block-length=4."""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
