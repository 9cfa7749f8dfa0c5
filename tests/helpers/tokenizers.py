"""Small tokenizers of the kinds that models of Hugging Face have."""

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

FAMILIES = ("byte_level", "llama2", "llama2_legacy", "metaspace", "gemma", "wordpiece")
TEXTS = ("the cat sat", "Grüße, 世界 🙂!", " leading", "two  spaces", "a\n\nb ", "naïve café")


def make(family: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a family; its special tokens are <s>, </s> and <|turn|>."""
    tokenizer = _MAKERS[family]()
    special = [AddedToken(name, special=True, normalized=False) for name in _SPECIAL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    return tokenizer


_SPECIAL = ("<s>", "</s>", "<|turn|>")


def _byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _byte_fallback() -> tokenizers.Tokenizer:
    """Byte tokens, letters, and merges that begin with a space."""
    words = ["▁", "t", "h", "e", "c", "a", "s", "▁t", "▁th", "▁the", "▁c", "▁s"]
    vocab = ["<unk>", *_SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *words]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁", "s")]
    ids = {token: i for i, token in enumerate(vocab)}
    return tokenizers.Tokenizer(
        models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )


_STRIPPING = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def _llama2() -> tokenizers.Tokenizer:
    tokenizer = _byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(_STRIPPING)
    return tokenizer


def _llama2_legacy() -> tokenizers.Tokenizer:
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(_STRIPPING)
    return tokenizer


def _gemma() -> tokenizers.Tokenizer:
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(_STRIPPING[:3])
    return tokenizer


def _metaspace() -> tokenizers.Tokenizer:
    characters = sorted({character for text in TEXTS for character in text} - {" "})
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.0), *((c, -3.0) for c in characters)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _wordpiece() -> tokenizers.Tokenizer:
    pieces = ["[UNK]", "the", "cat", "sat", "c", "##at", "##s", "!", ","]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


_MAKERS = {
    "byte_level": _byte_level,
    "llama2": _llama2,
    "llama2_legacy": _llama2_legacy,
    "gemma": _gemma,
    "metaspace": _metaspace,
    "wordpiece": _wordpiece,
}
