"""How do models of other code become models of this project, and the other way round?

    model, params = load_hf(path)                tensors, config = to_hf(model, params)
    model, params = load_official(path)          tensors, config = to_official(model, params)
    save_folder(folder, tensors, config)

Without PyTorch: NumPy and safetensors only. `launch/convert.py` is the command line of it.

    tensors.py         folders of safetensors
    mapping.py         tables of tensors, used in both directions
    stacks.py          the tables of GPT-NeoX, Llama and RoBERTa stacks
    fields.py          fields of a JSON object, read with a list of all that is wrong
    hf_config.py       config.json of transformers
    hf_rotary.py       its rotary positions
    agreement.py       do two configurations describe the same architecture?
    hf.py              vanilla models of Hugging Face
    official_config.py config.json of the authors' models
    official.py        Block Transformers of the authors
    uptrain.py         a block model from a vanilla model
"""

from blocktx.convert.hf import load_hf, load_neox, to_hf, to_neox
from blocktx.convert.official import load_official, to_official
from blocktx.convert.tensors import DTYPES, check_new, open_checkpoint, save_folder
from blocktx.convert.uptrain import MeanEmbedder, Method, lengthen, uptrain

__all__ = [
    "DTYPES",
    "MeanEmbedder",
    "Method",
    "check_new",
    "lengthen",
    "load_hf",
    "load_neox",
    "load_official",
    "open_checkpoint",
    "save_folder",
    "to_hf",
    "to_neox",
    "to_official",
    "uptrain",
]
