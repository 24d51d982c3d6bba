"""PAFT (losses/paft.py): what is merged, on numbers and on folders that are then evaluated."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import data
import evaluate
import policy as policies
from losses import paft

DOUBLE = torch.float64


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        yield


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small):
    """base, a and b: three tiny policies of the built-in task's words, with tied heads."""
    place, tokenizer = tmp_path_factory.mktemp("paft"), data.BuiltIn(0).tokenizer
    found = []
    for seed, name in enumerate(("base", "a", "b")):
        found.append(save(place / name, policies.build("tiny", tokenizer, 128, seed), tokenizer))
    return found


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def merged(folders, out, *more):
    assert paft.main([*folders, "--out", str(out), *more]) == 0
    return weights(out)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def random_policies(seed=0):
    """Three policies of two tensors each, float32."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(3):
        one = torch.randn(4, 5, generator=generator)
        found.append({"one": one, "two": torch.randn(7, generator=generator)})
    return found


# On numbers


def test_a_merge_by_hand():
    """base 1, 2, A 1.5, 2.1, B 1, 3 at w = 1/4: 1 + 0.125 + 0, 2 + 0.025 + 0.75. At density 1/2 A's
    0.1 is dropped."""
    rows = torch.tensor([[1.0, 2.0], [1.5, 2.1], [1.0, 3.0]], dtype=DOUBLE)
    base, first, second = ({"w": row} for row in rows)
    found = paft.merge(base, first, second, 0.25)["w"]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([1.125, 2.775], rel=1e-7)
    assert paft.merge(base, first, second, 0.25, 0.5)["w"].tolist() == pytest.approx([1.125, 2.75])


def test_the_ends_and_the_middle():
    """w = 1 is A and w = 0 is B, to the bit; 1/2 is their mean, whatever the base."""
    base, first, second = random_policies()
    assert_equal(paft.merge(base, first, second, 1.0), first)
    assert_equal(paft.merge(base, first, second, 0.0), second)
    other = {name: value + 1 for name, value in base.items()}
    for start in (base, other):
        for name, value in paft.merge(start, first, second, 0.5).items():
            mean = (first[name].double() + second[name].double()) / 2
            torch.testing.assert_close(value.double(), mean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("density, kept", [(1.0, 27), (0.3, 8), (0.5, 14), (0.01, 1)])
def test_the_largest_share_is_kept(density, kept):
    """Of both tensors together, by magnitude, unchanged; B's difference is not touched."""
    base, first, second = random_policies(1)
    difference = {name: first[name].double() - base[name].double() for name in base}
    found = paft.sparsified(difference, density)
    flat, whole = (torch.cat([p[n].flatten() for n in base]) for p in (found, difference))
    on = flat != 0
    assert on.sum() == kept and torch.equal(flat[on], whole[on])
    if kept < 27:
        assert whole[on].abs().min() > whole[~on].abs().max()
    for name, value in paft.merge(base, first, second, 0.5, density).items():
        expected = base[name] + 0.5 * found[name] + 0.5 * (second[name] - base[name])
        torch.testing.assert_close(value, expected.float())


def test_equal_magnitudes_stay_together():
    difference = {"w": torch.tensor([1.0, -1.0, 0.5, 0.0])}
    assert paft.sparsified(difference, 0.25)["w"].tolist() == [1.0, -1.0, 0.0, 0.0]


# On folders


def test_the_merged_folder(folders, tmp_path, capsys):
    """The mean of A and B, an ordinary policy folder with a head tied to its embedding, that
    evaluate.py takes. The three are as they were."""
    before = [weights(folder) for folder in folders]
    found = merged(folders, tmp_path / "out")
    for name, value in found.items():
        mean = (before[1][name].double() + before[2][name].double()) / 2
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
    assert found.keys() == before[0].keys() and "lm_head.weight" not in found
    model, tokenizer = policies.load(str(tmp_path / "out"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tokenizer.get_vocab() == data.BuiltIn(0).tokenizer.get_vocab()
    for folder, kept in zip(folders, before, strict=True):
        assert_equal(weights(folder), kept)
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "out"), folders[0], "--count", "4"]) == 0
    assert "win_rate" in capsys.readouterr().out


def test_options(folders, tmp_path):
    """--weight reaches the merge, 1 is A and 0 is B; --density drops some of A's difference alone,
    the same as merge's."""
    base, first, second = (weights(folder) for folder in folders)
    assert_equal(merged(folders, tmp_path / "first", "--weight", "1"), first)
    assert_equal(merged(folders, tmp_path / "second", "--weight", "0"), second)
    given = ["--weight", "0.25", "--density", "0.3"]
    found = merged(folders, tmp_path / "sparse", *given)
    assert_equal(found, paft.merge(base, first, second, 0.25, 0.3))
    assert_equal(merged(folders, tmp_path / "again", *given), found)


def llama(seed, heads=2, tied=False):
    """A Llama of width 16 with the built-in task's words, its head tied to the embedding or not."""
    tokenizer = data.BuiltIn(0).tokenizer
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
        initializer_range=0.4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def test_a_head_of_its_own(tmp_path):
    """It is merged as the other weights are."""
    paths, tokenizer = [], data.BuiltIn(0).tokenizer
    for seed in range(3):
        paths.append(save(tmp_path / str(seed), llama(seed), tokenizer))
    found = merged(paths, tmp_path / "out", "--weight", "0.25")
    assert_equal(found, paft.merge(*(weights(path) for path in paths), 0.25))
    assert "lm_head.weight" in found
    policies.load(str(tmp_path / "out"))


def test_what_is_refused(folders, tmp_path, capsys):
    """Exit status 2, one line that says what to do, and no folder."""
    base, first, second = folders
    words = data.BuiltIn(0).tokenizer
    wide = dict(n_layer=1, n_head=2, n_embd=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", wide)
        wide = save(tmp_path / "wide", policies.build("tiny", words, 128, 0), words)
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=4, n_embd=16))
        heads = save(tmp_path / "heads", policies.build("tiny", words, 128, 0), words)
    few = policies.word_tokenizer(["a", "b"])
    other = save(tmp_path / "other", policies.build("tiny", few, 128, 0), few)
    tied, untied = tmp_path / "tied", tmp_path / "untied"
    save(tied, llama(0, tied=True), words)
    save(untied, llama(0), words)
    there = tmp_path / "there"
    shutil.copytree(base, there)
    out = tmp_path / "out"
    cases = (
        ([base, first, wide, "--out", out], "other names or shapes"),
        ([tied, tied, untied, "--out", out], "other names or shapes"),
        ([base, heads, second, "--out", out], "differ in n_head"),
        ([base, first, other, "--out", out], "different tokenizers"),
        ([base, first, second, "--out", there], "is there already"),
        ([base, first, tmp_path / "nowhere", "--out", out], "no such folder"),
        ([base, first, second], "--out"),
        ([base, first, "--out", out], "required: b"),
        ([base, first, second, "--out", out, "--weight", "1.5"], "from 0 to 1"),
        ([base, first, second, "--out", out, "--weight", "nan"], "from 0 to 1"),
        ([base, first, second, "--out", out, "--weight", "much"], "--weight"),
        ([base, first, second, "--out", out, "--density", "0"], "above 0"),
    )
    for argv, advice in cases:
        assert paft.main([str(word) for word in argv]) == 2, argv
        said = capsys.readouterr().err
        assert said.startswith("paft: error: ") and said.count("\n") == 1 and advice in said, said
        assert not out.exists()


def test_the_worked_example(capsys):
    assert paft.main([]) == 0
    out = capsys.readouterr().out
    assert "+1.250 +2.050 -1.500 +0.300" in out and out.count("\n") == 5
