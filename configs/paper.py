r"""Every model of the paper (tables 1 and 3), on the Pile or on text of your own.

    python launch/train.py --config=configs/paper.py:block_170m --workdir=runs/block_170m \
        --config.data.source=/data/pile

The loss to expect is that of table 1, as 2.753 for block_170m. Names, for behind the colon:

    block_33m _77m _170m _420m _1b _1b4     the main models
    vanilla_31m _70m _160m _410m            the baselines
    megabyte_5m _19m _85m                   MEGABYTE, by its non-embedding parameters
    ratio_5_1 _2_1 _1_1 _1_2 _1_5           170M: layers of block decoder to token decoder
    length_1 _2 _4 _8                       170M: block length
    embedder_lookup _encoder _cls           170M: embedder
    prefix_1 _2 _4 _8                       170M: prefix length
    summation cross_attention               170M: other conditionings
    flops_70m_170m _420m _1b _1b4           block models with the training FLOPs of vanilla_70m
    uptrain_31m _70m _160m _410m _1b        block models from the halves of that vanilla model

All train on 300B tokens, flops_* and uptrain_* on fewer. Where the paper fixes no number, it is
that of the authors' configuration files (conf/trainer at github.com/itsnamgyu/block-transformer):

- Warm-up is 3000 steps of batch 256, and 1500 of 512.
- Steps of flops_*. Uptraining takes a tenth of the steps at the full learning rate, with random
  padding at every size.
- embedder_* have prefix length 1, and so has length_1.
- uptrain_1b starts from Pythia-1B. It has that model's 8 heads, where block_1b has 16.
- vanilla_31m has an MLP of 4096, by which it has 14M non-embedding and 40M parameters in place of
  the paper's 5M and 31M; --config.model.decoder.mlp_width=1024 gives those.

Ours are: summation and cross_attention differ from prefix_* in nothing else, so they have the
lookup embedder (the authors' files have cls). ratio_* are of the 12 layers, all of one width. They
and the other ablations train to the end (the authors stopped theirs early, on the same schedule).
"""

from typing import Any, NamedTuple

import ml_collections

from blocktx.config import (
    BlockConfig,
    DataConfig,
    EmbedderConfig,
    OptimizerConfig,
    RunConfig,
    StackConfig,
    TrainingConfig,
    VanillaConfig,
    to_config_dict,
)

_TOKENS = 300_000_000_000
_SHARED = dict(vocab_size=50_304, context_length=2048, compute_dtype="bfloat16")


class _Size(NamedTuple):
    layers: int  # of both decoders together
    width: int
    heads: int
    learning_rate: float
    batch_size: int = 256
    mlp_width: int | None = None  # None: 4 * width

    def stack(self, layers: int) -> StackConfig:
        return StackConfig(layers, self.width, self.heads, self.mlp_width)

    @property
    def steps(self) -> int:
        return _TOKENS // (self.batch_size * _SHARED["context_length"])


_BLOCK = {  # tables 1 and 3
    "33m": _Size(3 + 3, 256, 8, 1e-3),
    "77m": _Size(3 + 3, 512, 8, 1e-3),
    "170m": _Size(6 + 6, 768, 12, 6e-4),
    "420m": _Size(12 + 12, 1024, 16, 3e-4),
    "1b": _Size(8 + 8, 2048, 16, 3e-4, batch_size=512),
    "1b4": _Size(12 + 12, 2048, 16, 2e-4, batch_size=512),
}
_VANILLA = {
    "31m": _Size(6, 256, 8, 1e-3, mlp_width=4096),
    "70m": _Size(6, 512, 8, 1e-3),
    "160m": _Size(12, 768, 12, 6e-4),
    "410m": _Size(24, 1024, 16, 3e-4),
}
_PYTHIA_1B = _Size(16, 2048, 8, 3e-4, batch_size=512)
_MEGABYTE = {  # token decoder, and the block model whose width, heads and recipe it has; layers
    "5m": (StackConfig(layers=4, width=128, heads=4), "33m", 5),
    "19m": (StackConfig(layers=4, width=256, heads=8), "77m", 5),
    "85m": (StackConfig(layers=4, width=512, heads=8), "170m", 11),
}
_FLOPS_70M_STEPS = {"170m": 266_317, "420m": 98_120, "1b": 19_300, "1b4": 13_530}


def _run(model: BlockConfig | VanillaConfig, size: _Size, steps: int, padding: bool) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(
            source="data/pile",
            tokenizer="EleutherAI/pythia-160m",
            holdout_every=1000,
            random_padding=padding,
        ),
        optimizer=OptimizerConfig(
            learning_rate=size.learning_rate,
            warmup_steps=3000 * 256 // size.batch_size,
            schedule="linear",
            beta2=0.95,
            weight_decay=0.1,
        ),
        training=TrainingConfig(
            steps=steps,
            batch_size=size.batch_size,
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


def _vanilla(size: _Size) -> RunConfig:
    model = VanillaConfig(**_SHARED, decoder=size.stack(size.layers))
    return _run(model, size, size.steps, padding=False)  # blocks of one token have none


def _block(
    size: _Size, *, steps: int | None = None, padding: bool | None = None, **fields: Any
) -> RunConfig:
    """A main model of `size`, but for what is given."""
    half = size.stack(size.layers // 2)
    model = BlockConfig(**_SHARED | dict(block_decoder=half, token_decoder=half) | fields)
    if padding is None:
        padding = size.width < 1024  # below 420M
    return _run(model, size, steps or size.steps, padding)


def _ablation(**fields: Any) -> RunConfig:
    return _block(_BLOCK["170m"], **fields)


def _ratio(block: int, token: int) -> RunConfig:
    size = _BLOCK["170m"]
    layers = size.layers * block // (block + token)
    return _ablation(
        block_decoder=size.stack(layers), token_decoder=size.stack(size.layers - layers)
    )


def _megabyte(token_decoder: StackConfig, size: str, layers: int) -> RunConfig:
    return _block(
        _BLOCK[size],
        block_decoder=_BLOCK[size].stack(layers),
        token_decoder=token_decoder,
        conditioning="summation",
    )


def _uptrain(size: _Size) -> RunConfig:
    embedder = EmbedderConfig(kind="projection", width=size.width)
    return _block(size, embedder=embedder, steps=size.steps // 10, padding=True)


_RUNS: dict[str, RunConfig] = {
    **{f"block_{name}": _block(size) for name, size in _BLOCK.items()},
    **{f"vanilla_{name}": _vanilla(size) for name, size in _VANILLA.items()},
    **{f"megabyte_{name}": _megabyte(*parts) for name, parts in _MEGABYTE.items()},
    **{f"ratio_{b}_{t}": _ratio(b, t) for b, t in [(5, 1), (2, 1), (1, 1), (1, 2), (1, 5)]},
    **{
        f"length_{length}": _ablation(block_length=length, prefix_length=min(length, 2))
        for length in (1, 2, 4, 8)
    },
    **{
        f"embedder_{kind}": _ablation(embedder=EmbedderConfig(kind=kind), prefix_length=1)
        for kind in ("lookup", "encoder", "cls")
    },
    **{f"prefix_{length}": _ablation(prefix_length=length) for length in (1, 2, 4, 8)},
    "summation": _ablation(conditioning="summation"),
    "cross_attention": _ablation(conditioning="cross_attention"),
    **{
        f"flops_70m_{name}": _block(_BLOCK[name], steps=steps)
        for name, steps in _FLOPS_70M_STEPS.items()
    },
    **{f"uptrain_{name}": _uptrain(size) for name, size in _VANILLA.items()},
    "uptrain_1b": _uptrain(_PYTHIA_1B),
}
NAMES = tuple(_RUNS)


def get_config(name: str = "") -> ml_collections.ConfigDict:
    """The run called `name`.

    Raises:
      ValueError: there is none; the message lists those that there are.
    """
    if name not in _RUNS:
        problem = f":{name}: unknown; use" if name else " needs a name, as in paper.py:block_170m;"
        raise ValueError(f"configs/paper.py{problem} one of {', '.join(NAMES)}")
    return to_config_dict(_RUNS[name])
