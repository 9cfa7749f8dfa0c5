"""The tokens of documents, as lists."""

from blocktx.data.documents import Documents


def token_lists(documents: Documents) -> list[list[int]]:
    offsets = documents.offsets
    ranges = [(int(offsets[i]), int(offsets[i + 1])) for i in documents.ids()]
    return [tokens.tolist() for tokens in documents.read(ranges)]
