r"""Draw the pictures of the README: launch/pictures/model.png and gain.png.

    python launch/draw_readme.py

gain.png shows figures of 2 CPU cores, float32, 2026-11-24, of

    python launch/benchmark.py --config=configs/paper.py:block_170m --against=vanilla_160m \
        --dtype=float32 --prompt=2048 --new=128 --batch_sizes=8
"""

import pathlib

from blocktx import command_line, plotting

_FOLDER = pathlib.Path(__file__).parent / "pictures"
_MEASURED = {  # of block_170m and vanilla_160m
    "generated tokens per second": (160.9, 12.4),
    "seconds to the first token": (2.5, 26.6),
    "MB of memory per sequence": (25, 239),
}
_BLOCKS = (
    ("The", "Union", "has", "been"),
    ("at", "peace", "with", "all"),
    ("na", "tions", ",", "and"),
)
_EMBED, _BLOCK_DECODER, _TOKEN_DECODER = "#e8eef7", "#cfe0f3", "#fbe0cc"


def draw_model():
    """Return a figure of the three parts and of what they hand on."""
    figure, axes = plotting.new_figure(width=7.4, height=4.15)
    figure.get_layout_engine().set(w_pad=0, h_pad=0)
    axes.set(xlim=(0, 12.6), ylim=(-0.15, 6.9), aspect="equal")
    axes.set_axis_off()

    def box(x, y, width, height, text, color, size=9):
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=0.12"
        axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec="#444444", lw=0.9)
        )
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)

    def arrow(x, y, to_x, to_y):
        axes.annotate(
            "",
            (to_x, to_y),
            (x, y),
            arrowprops=dict(arrowstyle="-|>", color="#444444", lw=1.1, shrinkA=0, shrinkB=0),
        )

    def tokens(x, y, words):
        for i, word in enumerate(words):
            box(x + 0.85 * i, y, 0.8, 0.5, word, "white", size=8)

    width, gap = 3.35, 0.4
    for i, words in enumerate(_BLOCKS):
        x = 0.15 + i * (width + gap)
        middle = x + width / 2
        tokens(x, 0, words)
        arrow(middle, 0.55, middle, 0.95)
        box(x, 1.0, width, 0.6, "embedder", _EMBED)
        arrow(middle, 1.6, middle, 2.0)
        arrow(middle, 3.0, middle, 3.9)
        box(x, 3.95, width, 1.0, "token decoder\nattention over one block", _TOKEN_DECODER)
        arrow(middle, 4.95, middle, 5.4)
        following = _BLOCKS[i + 1] if i < 2 else ("the", "A", "mer", "ic")
        tokens(x, 5.45, following)
    box(
        0.15,
        2.05,
        3 * width + 2 * gap,
        0.95,
        "block decoder: causal attention over blocks, the only global attention and KV cache",
        _BLOCK_DECODER,
    )
    right = 0.15 + 3 * width + 2 * gap + 0.15
    for y, text in (
        (0.25, "tokens"),
        (3.4, "context\nembedding"),
        (5.7, "next block"),
    ):
        axes.text(right, y, text, ha="left", va="center", fontsize=8.5, color="#444444")
    axes.text(
        0.15,
        6.45,
        "Each block of K = 4 tokens becomes one vector. Each context embedding is all that\n"
        "the token decoder knows of the blocks before the one that it writes.",
        fontsize=9,
        va="center",
    )
    return figure


def draw_gain():
    """Return a figure of decoding at the paper's sizes."""
    figure, grid = plotting.new_grid(1, 3, width=7.4, height=2.7)
    for axes, (what, pair) in zip(grid[0], _MEASURED.items(), strict=True):
        bars = axes.bar(
            ["block\n170M", "vanilla\n160M"], pair, color=[plotting.BLOCK, plotting.VANILLA]
        )
        axes.bar_label(bars, [plotting.number(value) for value in pair], fontsize=9, padding=2)
        axes.set_title(what, fontsize=9.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
        axes.grid(visible=False)
        axes.margins(y=0.15)
    figure.suptitle("2,048 tokens in, 128 out, batch 8, on 2 CPU cores", fontsize=10)
    return figure


def main() -> None:
    print(plotting.save(draw_model(), _FOLDER / "model.png"))
    print(plotting.save(draw_gain(), _FOLDER / "gain.png"))


if __name__ == "__main__":
    command_line.run(main, required=())
