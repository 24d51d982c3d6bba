"""The main job on decoders other than GPT-2, from an ordinary folder to an ordinary folder."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import policy as policies
import train
from test_architectures import tiny
from test_data import records, write

KINDS = ["gpt2", "gpt_neox", "opt", "llama", "qwen2", "qwen3"]
FEW = "--supervised-steps 2 --preference-steps 2 --steps 5 --batch-size 4 --eval-prompts 4".split()
FEW += "--max-prompt-tokens 24 --max-response-tokens 6 --device cpu".split()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Comparisons, and a tokenizer of their bytes."""
    import datasets

    folder = tmp_path_factory.mktemp("compared")
    demos, rows = records(240)
    tokenizer = policies.byte_tokenizer([row["prompt"] + row["completion"] for row in demos], 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield write(folder / "c.jsonl", rows), tokenizer


def saved(folder, kind, tokenizer, rows=320):
    """A random model's folder: its embedding has more rows than the tokenizer has ids."""
    model = tiny(kind, 0, torch.float32, vocab_size=rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Two of them here: each takes all the stages.
LATER = ("opt", "qwen2", "gpt_neox", "qwen3")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in LATER)) for kind in KINDS],
)
def test_five_steps(tmp_path, compared, kind, capsys):
    """Ends with 0; the first step's log-ratio is exactly 0; policy/ is an ordinary folder, whose
    weights have moved; no id that the tokenizer lacks was drawn."""
    path, tokenizer = compared
    folder = saved(tmp_path / kind, kind, tokenizer)
    argv = ["--policy", str(folder), "--comparisons", path, "--stages", str(tmp_path / "stages")]
    assert train.main([*argv, *FEW, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4] and steps[0]["log_ratio"] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert type(model) is type(tiny(kind, 0, torch.float32))
    (stage,) = (tmp_path / "stages").glob("supervised-*")
    start = load_file(stage / "model.safetensors")
    end = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert start.keys() == end.keys()
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_ids_that_the_tokenizer_lacks_have_no_probability(tmp_path, compared):
    """In scoring as in sampling: the law over the tokenizer's ids sums to 1."""
    _, tokenizer = compared
    model, _ = policies.load(str(saved(tmp_path / "llama", "llama", tokenizer)))
    prompt = policies.pad([[5, 6], [7]], "left", 0)
    known = torch.arange(len(tokenizer))
    total = torch.zeros(2)
    for token in known.tolist():
        response = policies.pad([[token]] * 2, "right", 0)
        total += policies.log_prob(model, prompt, response).detach().exp()
    assert total.tolist() == pytest.approx([1, 1], rel=1e-5)
    assert len(tokenizer) < 320


REFUSED = {
    "code": ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "own"}, "own"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quanti"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_loaded(tmp_path, compared, case):
    """One line; code that lies in the folder is not run."""
    _, tokenizer = compared
    folder = saved(tmp_path / "llama", "llama", tokenizer)
    change, said = REFUSED[case]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError) as error:
        policies.load(str(folder))
    assert "\n" not in str(error.value) and said in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_recurrent_policy_is_refused(tmp_path, compared):
    _, tokenizer = compared
    config = transformers.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match="cannot load a policy") as error:
        policies.load(str(tmp_path / "mamba"))
    assert "\n" not in str(error.value)
