"""Finding 6: throughput with a long prompt against vanilla's with a short one."""

from blocktx.reproduce.scale import Base
from blocktx.reproduce.study import Found, Results, Speed, Study, holds


def study(base: Base) -> Study:
    scale = base.scale
    prompts = {"block": scale.long_prompt, "vanilla": scale.long_prompt // 4}
    models = {"block": base.fast_block, "vanilla": base.fast_vanilla}
    speed = Speed("long_prompt", models, prompts, scale.new_tokens, scale.long_batch_size)

    def find(results: Results) -> Found:
        speeds = results.rates(speed.name)
        return Found(
            [
                holds(
                    speeds["block"] > speeds["vanilla"],
                    "the block model is faster, prompt included, at four times the prompt",
                    f"{speeds['block'] / speeds['vanilla']:.2f}x",
                )
            ],
            ["model", "prompt", "tokens/s"],
            [[name, str(prompts[name]), f"{speeds[name]:.1f}"] for name in models],
            [],
        )

    return Study(
        "long_prompt",
        f"6. With a prompt of {prompts['block']} tokens a block model is faster than vanilla with "
        f"{prompts['vanilla']}.",
        [],
        [speed],
        find,
    )
