"""Finding 4, first half: the embedders; and those that begin as the mean of a block."""

from blocktx.config import EmbedderConfig, EncoderConfig
from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Found, Results, Run, Study, lower, spread


def study(base: Base) -> Study:
    # A third of the block decoder's width, as 256 is of the paper's 768.
    heads = EncoderConfig.heads
    width = base.block.model.block_decoder.width // 3 // heads * heads
    runs = {"lookup": common.prefix(base, 1)}
    for kind in ("encoder", "cls"):
        embedder = EmbedderConfig(kind=kind, encoder=EncoderConfig(width=width))
        runs[kind] = Run(f"embedder_{kind}", base.vary(embedder=embedder, prefix_length=1))

    def find(results: Results) -> Found:
        losses = {kind: results.values(run.name) for kind, run in runs.items()}
        noise = results.noise()
        return Found(
            [
                lower(losses["lookup"], losses[kind], f"lookup has a lower loss than {kind}", noise)
                for kind in ("encoder", "cls")
            ],
            ["embedder (prefix length 1)", "loss"],
            [[kind, spread(of)] for kind, of in losses.items()],
            [common.compared("embedder", "Embedder", losses)],
        )

    return Study(
        "embedder",
        "4a. The lookup embedder is at least as good as encoder and CLS.",
        list(runs.values()),
        [],
        find,
    )


def mean_study(base: Base) -> Study:
    """Return the study of an embedder that begins as a mean and learns to deviate from it."""
    runs = {"lookup": common.ordinary(base), "projection": common.projection(base)}
    for kind in ("mean", "mean_mlp"):
        runs[kind] = Run(f"embedder_{kind}", base.vary(embedder=EmbedderConfig(kind=kind)))

    def find(results: Results) -> Found:
        losses = {kind: results.values(run.name) for kind, run in runs.items()}
        noise = results.noise()
        rows = [
            [kind, f"{results.values(run.name, 'non_embedding')[0]:,}", spread(losses[kind])]
            for kind, run in runs.items()
        ]
        return Found(
            [
                lower(
                    losses["mean_mlp"],
                    losses[kind],
                    f"mean plus MLP has a lower loss than {kind}",
                    noise,
                )
                for kind in ("lookup", "projection", "mean")
            ],
            ["embedder", "non-embedding", "loss"],
            rows,
            [common.compared("mean_embedder", "Embedders that begin as a mean", losses)],
        )

    return Study(
        "mean_embedder",
        "An embedder that adds an MLP to the mean of a block's embeddings is better than lookup.",
        list(runs.values()),
        [],
        find,
    )
