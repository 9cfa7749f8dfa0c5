"""Commands, Python code, links and paths of the documents."""

import ast
import configparser
import dataclasses
import importlib.util
import pathlib
import re
import shlex
import subprocess
import typing

import pytest

from blocktx.config import RunConfig, StackConfig, VanillaConfig
from blocktx.convert import save_folder, to_hf
from blocktx.model import build
from tests.helpers.random_weights import random_params
from tests.helpers.scored_models import BLOCK, save_run

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "launch/*.md", "configs/*.md", "blocktx/*/*.md")
    for path in ROOT.glob(pattern)
)
ONE_LINE = re.compile(r"\\\n\s*")


def blocks(language):
    """Return the fenced blocks of a language, with the document and the number of each."""
    params = []
    for path in DOCUMENTS:
        found = re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)
        for number, text in enumerate(found, 1):
            params.append(pytest.param(text, id=f"{path.relative_to(ROOT)}:{number}"))
    return params


def commands(script):
    """Return the arguments of all commands that run a script, by document, also from docstrings."""
    found = []
    for path in [*DOCUMENTS, *ROOT.glob("launch/*.py"), *ROOT.glob("configs/*.py")]:
        text = path.read_text()
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        inside = ""
        for line in ONE_LINE.sub(" ", text).splitlines():
            if inside:  # a quoted argument goes on
                inside += " " + line.strip()
            elif re.search(rf"(^|\s)([\w./]*/)?python {re.escape(script)} ", line):
                inside = line.strip()
            if inside:
                try:
                    words = shlex.split(inside, comments=True)
                except ValueError:  # no closing quote yet
                    continue
                place = words.index(script)
                found.append((path.relative_to(ROOT), words[place + 1 :]))
                inside = ""
    return found


def flags_of(script):
    """Return the names in the script's DEFINE calls, without running it."""
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / script).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    return {call.args[0].value for call in calls if call.func.attr.startswith("DEFINE")}


def is_field(name):
    """Return whether config.a.b is a field of RunConfig with a block or a vanilla model."""
    classes = [RunConfig]
    for part in name.split(".")[1:]:
        hints = [
            typing.get_type_hints(c)[part]
            for c in classes
            if hasattr(c, "__mro__") and part in {f.name for f in dataclasses.fields(c)}
        ]
        if not hints:
            return False
        options = [o for hint in hints for o in (hint, *typing.get_args(hint))]
        classes = [option for option in options if dataclasses.is_dataclass(option)]
    return True


SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("launch/*.py")
    if path.name not in ("convert.py", "draw_readme.py")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_printed_commands_exist(script):
    known = flags_of(script) | {"help", "verbosity"}
    for path, words in commands(script):
        for word in words:
            if word in (">", "&", "&&", "|", "..."):
                break
            if not word.startswith("--"):
                continue
            name = word[2:].partition("=")[0]
            if name.startswith("config."):
                assert is_field(name), f"{path}: no field {name}"
            else:
                name = name if name in known else name.removeprefix("no")
                assert name in known, f"{path}: {script} has no flag --{name}"


def test_the_quick_start_is_found():
    """The extraction finds what .ci/run runs."""
    assert any(
        path.name == "README.md" and "--resume" in words
        for path, words in commands("launch/train.py")
    )
    assert is_field("config.training.steps")
    assert is_field("config.model.decoder.mlp_width")
    assert not is_field("config.training.stepz")
    assert VanillaConfig.kind == "vanilla"


def test_conversions_parse():
    spec = importlib.util.spec_from_file_location("convert", ROOT / "launch" / "convert.py")
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    found = commands("launch/convert.py")
    assert len(found) > 3
    for path, words in found:
        if "COMMAND" in words or "--help" in words:
            continue
        try:
            convert._parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{path}: convert.py {shlex.join(words)}")


@pytest.mark.parametrize("text", blocks("bash"))
def test_bash_parses(text):
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert not done.stderr


@pytest.mark.parametrize("text", blocks("bash"))
def test_scripts_of_bash_blocks_exist(text):
    for name in re.findall(r"(?<![\w/.-])((?:launch|configs)/[\w/.]+\.(?:py|sh))", text):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("text", blocks("python"))
def test_python_runs(text, run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    exec(compile(text, "block", "exec"), {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which runs/quickstart is a run, and smollm2 a model, with random weights."""
    folder = tmp_path_factory.mktemp("documents")
    path = save_run(folder, dataclasses.replace(BLOCK, context_length=256))
    (folder / "runs").mkdir()
    (folder / "runs" / "quickstart").symlink_to(path)
    decoder = StackConfig.llama(2, 32, 4, key_value_heads=2)
    llama = build(VanillaConfig(vocab_size=50, context_length=32, decoder=decoder))
    save_folder(folder / "smollm2", *to_hf(llama, random_params(llama)))
    return folder


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, target


def test_extras_are_installed_from_the_clone():
    """The package is not on PyPI, so `pip install 'blocktx[...]'` finds nothing."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    named = set()
    for path in [*DOCUMENTS, *ROOT.glob("launch/*"), *ROOT.glob("blocktx/**/*.py")]:
        if path.suffix in (".md", ".py", ".sh", ".ipynb"):
            text = path.read_text()
            assert not re.search(r"pip install '?blocktx\[", text), path
            for found in re.findall(r"pip install (?:-q |--quiet )?-e '\.\[([\w,]+)\]'", text):
                assert set(found.split(",")) <= extras, path
                named |= set(found.split(","))
    assert named >= {"demo", "gcs", "parquet", "hub", "aot", "serve"}


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"`((?:\w+/)+(?:\w+\.(?:py|sh))?|\w+\.py)`", text)
    assert len(names) > 20
    for name in names:
        assert (ROOT / "blocktx" / name).exists() or (ROOT / name).exists(), name


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
