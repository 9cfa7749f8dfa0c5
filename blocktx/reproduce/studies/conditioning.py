"""Finding 4, second half: how the token decoder is told of the context."""

import itertools

from blocktx.reproduce.scale import Base
from blocktx.reproduce.studies import common
from blocktx.reproduce.study import Found, Results, Run, Study, lower, spread


def study(base: Base) -> Study:
    prefixes = {length: common.prefix(base, length) for length in (1, 2, 4)}
    others = {
        kind: Run(kind, base.vary(conditioning=kind)) for kind in ("summation", "cross_attention")
    }

    def find(results: Results) -> Found:
        losses = {f"prefix of {n}": results.values(run.name) for n, run in prefixes.items()}
        losses |= {kind.replace("_", "-"): results.values(run.name) for kind, run in others.items()}
        ordinary = f"prefix of {base.block.model.prefix_length}"
        order = [ordinary, "summation", "cross-attention"]
        longer = [f"prefix of {n}" for n in prefixes]
        noise = results.noise()
        return Found(
            [
                lower(
                    losses[better], losses[worse], f"{better} has a lower loss than {worse}", noise
                )
                for names in (order, longer[::-1])
                for better, worse in itertools.pairwise(names)
            ],
            ["conditioning", "loss"],
            [[kind, spread(of)] for kind, of in losses.items()],
            [common.compared("conditioning", "Conditioning of the token decoder", losses)],
        )

    return Study(
        "conditioning",
        "4b. Prefix conditioning is better than summation, that better than cross-attention; "
        "longer prefixes help.",
        [*prefixes.values(), *others.values()],
        [],
        find,
    )
