"""What may be wrong with a policy's folder, on purpose or not: one line that names it, within
seconds; nothing in it is run, waited for or read without end."""

import json
import os
import random
import shutil
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

import files
import policy as policies
import preference_model
from limit import within
from test_bad_input import broken

WIDTH = dict(n_layer=1, n_head=2, n_embd=16)
EVIL = "open({!r}, 'w').close()\n"


@pytest.fixture(autouse=True)
def quiet():
    """As every command begins."""
    policies.quiet()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A policy's folder, whose tokenizer is a byte-level BPE."""
    folder = tmp_path_factory.mktemp("good") / "policy"
    tokenizer = policies.byte_tokenizer([f"post {number} about it" for number in range(99)], 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", WIDTH)
        model = policies.build("tiny", tokenizer, 32, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text(name, content):
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def edited(name, change):
    """Spoils an object {...}: change(it) in place."""

    def spoil(folder):
        found = json.loads((folder / name).read_text())
        change(found)
        (folder / name).write_text(json.dumps(found))

    return spoil


def config(**values):
    return edited("config.json", lambda found: found.update(values))


def tokens(change):
    return edited("tokenizer.json", change)


def weights(change):
    def spoil(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return spoil


def pipe(name):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def device(name):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return spoil


def index(content):
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        torch.save({}, folder / "other.bin")
        (folder / "model.safetensors.index.json").write_text(content)

    return spoil


def code(folder):
    """A model of no known type that brings its own code."""
    config(model_type="evil", auto_map={"AutoConfig": "evil.C"})(folder)
    (folder / "evil.py").write_text(EVIL.format(str(folder.parent / "ran")))


def merges(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (folder / "merges.txt").write_text("#version\na\n")


def vocabulary(change):
    return tokens(lambda found: change(found["model"]["vocab"]))


def last_id(value):
    return vocabulary(lambda vocab: vocab.update({max(vocab, key=vocab.get): value}))


def special(found):
    """A tokenizer in Rust that panics when it is used, not when it is read."""
    piece = {"SpecialToken": {"id": "[X]", "type_id": 0}}
    template = dict(type="TemplateProcessing", single=[piece], pair=[], special_tokens={})
    found.update(post_processor=template)


DEEP = "[" * 100_000
# what is spoiled, what the message must hold
POLICIES = {
    "code of its own": (code, "custom code"),
    "an index of a pickle": (index('{"weight_map": {"a": "other.bin"}}'), "a pickle"),
    "an index of another folder": (
        index('{"weight_map": {"a": "../../other.safetensors"}}'),
        "in another folder",
    ),
    "an index without a map": (index("{}"), "no weight_map"),
    "an index of numbers": (index('{"weight_map": {"a": 3}}'), "no weight_map"),
    "an index that is a list": (index("[]"), "index.json: is damaged"),
    "an adapter": (text("adapter_config.json", "{}"), "adapter"),
    "no heads": (config(n_head=0), "division"),
    "no layers": (config(n_layer=0), "0 layers"),
    "-1 layers": (config(n_layer=-1), "-1 layers"),
    "10^6 layers": (config(n_layer=10**6), "1000000"),
    "10^400 layers": (config(n_layer=10**400), "n_layer 1000"),
    "layers, a word": (config(n_layer="two"), "n_layer"),
    "layers, null": (config(n_layer=None), "n_layer"),
    "layers, NaN": (config(n_layer=float("nan")), "n_layer"),
    "no width": (config(n_embd=0), "cannot load"),
    "no vocabulary": (config(vocab_size=0), "transformer.wte.weight"),
    "a vocabulary of 10^12": (config(vocab_size=10**12), "transformer.wte.weight"),
    "a vocabulary, a list": (config(vocab_size=[300]), "cannot load"),
    "positions, null": (config(n_positions=None), "n_positions"),
    "no such activation": (config(activation_function="nope"), "nope"),
    "a type that is a list": (config(model_type=["gpt2"]), "cannot load"),
    "quantised": (config(quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
    "quantised, a word": (config(quantization_config="x"), "cannot load"),
    "an attention that is not installed": (
        config(_attn_implementation="flash_attention_2"),
        "cannot load",
    ),
    "control characters": (config(model_type="ev\x1b[31mil"), "ev"),
    "config, a list": (text("config.json", "[]"), "config.json: is damaged"),
    "config, null": (text("config.json", "null"), "config.json: is damaged"),
    "config, empty": (text("config.json", ""), "config.json: is damaged"),
    "config, binary": (text("config.json", b"\xff\x00"), "config.json: is damaged"),
    "config, deep": (text("config.json", DEEP), "config.json: is damaged"),
    "config, a pipe": (pipe("config.json"), "is no file"),
    "config, a device": (device("config.json"), "is no file"),
    "weights, a pipe": (pipe("model.safetensors"), "is no file"),
    "weights, a device": (device("model.safetensors"), "is no file"),
    "weights, NaN": (
        weights(lambda found: found["transformer.wte.weight"][3].fill_(float("nan"))),
        "transformer.wte.weight hold NaN",
    ),
    "weights, infinite": (
        weights(lambda found: found["transformer.ln_f.bias"].fill_(float("inf"))),
        "transformer.ln_f.bias hold NaN or inf",
    ),
    "weights, one missing": (
        weights(lambda found: found.pop("transformer.ln_f.bias")),
        "lack transformer.ln_f.bias",
    ),
    "weights, a head without end": (text("model.safetensors", b"\xff" * 60), "cannot load"),
    "generation, broken": (text("generation_config.json", "{"), "generation_config.json: is dam"),
    "generation, a device": (device("generation_config.json"), "is no file"),
    "a hole in the ids": (last_id(777), "the model 300"),
    "a negative id": (last_id(-4), "tokenizer"),
    "one id twice": (last_id(5), "one id"),
    "broken merges": (tokens(lambda found: found["model"].update(merges=["a"])), "tokenizer"),
    "merges of nothing": (
        tokens(lambda found: found["model"].update(merges=[["qq", "zz"]])),
        "tokenizer",
    ),
    "no vocabulary in the tokenizer": (vocabulary(dict.clear), "tokenizer"),
    "broken merges.txt": (merges, "tokenizer"),
    "a tokenizer that panics": (tokens(special), "tokenizer"),
    "a tokenizer of a pipe": (pipe("tokenizer.json"), "is no file"),
    "tokenizer config, a list": (text("tokenizer_config.json", "[]"), "tokenizer_config.json: is"),
    "tokenizer config, null": (text("tokenizer_config.json", "null"), "tokenizer_config.json: is"),
    "tokenizer config, a device": (device("tokenizer_config.json"), "is no file"),
    "no such tokenizer": (
        edited("tokenizer_config.json", lambda found: found.update(tokenizer_class=3)),
        "tokenizer",
    ),
}


def refused(load, folder, capfd):
    """The error of load(folder): a ValueError of one line, and nothing on the standard error."""
    capfd.readouterr()
    with pytest.raises(ValueError) as raised, within():
        load(str(folder))
    message = str(raised.value)
    assert message.startswith(str(folder)) and "\n" not in message
    assert capfd.readouterr().err == ""
    return message


@pytest.mark.parametrize("case", POLICIES)
def test_a_policy_that_is_spoiled(tmp_path, good, capfd, monkeypatch, case):
    spoil, expected = POLICIES[case]
    shutil.copytree(good, tmp_path / "policy")
    spoil(tmp_path / "policy")
    if case == "one id twice" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("an older transformers keeps one of the two entries, now this one, now that")

    def asked(*_):
        raise AssertionError("standard input was read")

    monkeypatch.setattr("builtins.input", asked)
    assert expected in refused(policies.load, tmp_path / "policy", capfd)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_code_beside_a_known_model_is_not_run(tmp_path, good):
    """Its type is known, and so is its tokenizer: what it brings is left alone."""
    shutil.copytree(good, tmp_path / "policy")
    config(auto_map={"AutoModelForCausalLM": "evil.M"})(tmp_path / "policy")
    (tmp_path / "policy" / "evil.py").write_text(EVIL.format(str(tmp_path / "ran")))
    policies.load(str(tmp_path / "policy"))
    assert not (tmp_path / "ran").exists()


def test_a_path_is_no_hub_name(tmp_path, monkeypatch):
    """runs/typo is a folder that is not there, where runs is one; else OWNER/NAME of the hub."""
    monkeypatch.chdir(tmp_path)
    assert not policies.looks_like_path("runs/typo")
    os.mkdir("runs")
    with pytest.raises(ValueError, match="runs/typo: no such folder"):
        policies.load("runs/typo")


def test_links_of_the_hub_clients_cache_are_followed(tmp_path, good):
    (tmp_path / "snapshot").mkdir()
    for path in good.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    policies.load(str(tmp_path / "snapshot"))


JUDGES = {
    "10^6 layers": (
        edited("config.json", lambda found: found["body"].update(n_layer=10**6)),
        "n_layer",
    ),
    "a width of 10^7": (
        edited("config.json", lambda found: found["body"].update(n_embd=10**7)),
        "the shape",
    ),
    "no body": (edited("config.json", lambda found: found.pop("body")), "body"),
    "NaN": (weights(lambda found: found["token.0.bias"].fill_(float("nan"))), "token.0.bias"),
    "one missing": (weights(lambda found: found.pop("token.0.bias")), "token.0.bias"),
    "another shape": (
        weights(lambda found: found.update({"token.0.bias": torch.zeros(3)})),
        "token.0.bias",
    ),
    "config, a list": (text("config.json", "[]"), "config.json"),
    "config, deep": (text("config.json", DEEP), "config.json"),
    "config, a pipe": (pipe("config.json"), "is no file"),
    "weights, a device": (device("model.safetensors"), "is no file"),
    "weights, cut": (
        lambda folder: os.truncate(folder / "model.safetensors", 99),
        "preference model",
    ),
}


@pytest.mark.parametrize("case", JUDGES)
def test_a_judge_that_is_spoiled(tmp_path, good, capfd, case):
    spoil, expected = JUDGES[case]
    model = preference_model.PreferenceModel(policies.load(str(good))[0])
    preference_model.save(model, tmp_path / "judge")
    preference_model.load(tmp_path / "judge")
    spoil(tmp_path / "judge")
    assert expected in refused(preference_model.load, tmp_path / "judge", capfd)


def test_escaped():
    """What a terminal obeys is written out; line ends, tabs and every letter stay."""
    assert files.escaped("a\x1b[31mb\x07\r\x9b\u202e") == "a\\x1b[31mb\\x07\\r\\x9b\\u202e"
    assert files.escaped("ä\t😀\n\udcff") == "ä\t😀\n\\udcff"


@pytest.mark.slow
def test_fuzz_policies(tmp_path, good, capfd):
    """100 folders of which one file's bytes are spoiled: a policy, or a ValueError of one line."""
    rng = random.Random(9)
    names = sorted(path.name for path in good.iterdir())
    for number in range(100):
        folder = tmp_path / "policy"
        shutil.copytree(good, folder)
        name = rng.choice(names)
        (folder / name).write_bytes(broken(rng, (folder / name).read_bytes()))
        try:
            with within():
                policies.load(str(folder))
        except ValueError as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error), (number, name)
        assert capfd.readouterr().err == "", (number, name)
        shutil.rmtree(folder)
