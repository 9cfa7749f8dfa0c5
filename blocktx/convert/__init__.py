"""Models of other code, and back: the authors' Block Transformers, GPT-NeoX and Pythia.

    model, params = load_official(path)          tensors, config = to_official(model, params)
    model, params = load_neox(path)              tensors, config = to_neox(model, params)
    save_folder(folder, tensors, config)

numpy and safetensors only. `launch/convert.py` is the same from the command line.
"""

from blocktx.convert.neox import load_neox, to_neox
from blocktx.convert.official import load_official, to_official
from blocktx.convert.tensors import DTYPES, check_new, open_checkpoint, save_folder
from blocktx.convert.uptrain import Method, lengthen, uptrain

__all__ = [
    "DTYPES",
    "Method",
    "check_new",
    "lengthen",
    "load_neox",
    "load_official",
    "open_checkpoint",
    "save_folder",
    "to_neox",
    "to_official",
    "uptrain",
]
