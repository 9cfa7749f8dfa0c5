r"""Write the teacher's most probable tokens for all steps of a distillation run, once.

    python launch/cache_teacher.py --config=configs/distill.py:logits --output=runs/teacher
    python launch/train.py --config=configs/distill.py:logits --workdir=runs/distill/logits-0 \
        --config.distill.cache=runs/teacher

Training then reads them in place of running the teacher. Stages with a hidden_weight need the
teacher itself. The same command goes on after an interruption. A token takes 4 bytes for each of
--top_k (6 with a vocabulary above 65,536).
"""

from absl import flags
from ml_collections import config_flags

from blocktx import command_line
from blocktx.config import from_config_dict
from blocktx.train import write_cache

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A Python file whose get_config() describes the run (see configs/)."
)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write, new or to be continued.")
_TOP_K = flags.DEFINE_integer("top_k", 32, "Tokens kept for each token of the batches.")


def main() -> None:
    config = from_config_dict(_CONFIG.value)
    print(write_cache(config, _OUTPUT.value, _TOP_K.value))


if __name__ == "__main__":
    command_line.run(main, required=("config", "output"))
