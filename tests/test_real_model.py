"""studies/readers.py, a preference of rules on text, and studies/real_model.py, which aligns a real
model with it: here a tiny one stands in for it, and nothing is downloaded."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import policy as policies
from studies import readers, real_model
from studies import real_model_page as page
from test_data import records, write

POST = "Me [22F] with Bob, 2 years\nWe moved to Paris. Our Landlord raised the rents again."


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_key_words_by_hand():
    """Names inside a sentence, numbers, words of five letters but for common ones; cut to five."""
    wanted = {"22f", "bob", "2", "years", "moved", "paris", "landl", "raise", "rents"}
    assert readers.key_words(POST) == wanted
    assert readers.names_and_numbers("I saw I'm Anna's 3 dogs. The end\nNow") == {"anna", "3"}


@pytest.mark.parametrize(
    ("summary", "wanted"),
    [
        ("We moved to Paris.", 0),
        ("we moved to Paris", 2),  # no capital, no full stop
        ("22F moved to Paris!", 0),  # a figure begins, too
        ("We moved.", 1),  # two words
        ("", 3),
        ("We moved to Rome in 1999.", 2),  # a name and a number that the post has not
        ("We moved to us and we moved to us and we moved.", 5),  # runs of three said before
        ('She said "no way."', 0),
    ],
)
def test_faults_by_hand(summary, wanted):
    assert readers.faults(POST, summary) == wanted


def test_votes_by_hand():
    """Three key words to one, 6 words to 3, 0 faults to 2; and the other way round."""
    y, other = "Bob and I moved to Paris.", "Bob was sad"
    assert readers.counts(POST, y) == (3, 6, 0) and readers.counts(POST, other) == (1, 3, 2)
    forth = readers.votes([POST], [y], [other])[0].tolist()
    assert forth == pytest.approx([sigmoid(3), sigmoid(-0.6), sigmoid(3)])
    back = readers.votes([POST], [other], [y])[0].tolist()
    assert back == pytest.approx([1 - vote for vote in forth])
    p = readers.preference([POST] * 2, [y, other], [other, other]).tolist()
    assert p == pytest.approx([sum(forth) / 3, 0.5])
    assert readers.preference([], [], []).shape == (0,)


def test_the_example_is_a_cycle():
    """7, 4 and 1 key words, 23, 5 and 12 words, 1, 2 and 0 faults: each beats the next."""
    counted = [readers.counts(readers.POST, text) for text in readers.CYCLE]
    assert counted == [(7, 23, 1), (4, 5, 2), (1, 12, 0)]
    by_hand = [
        sigmoid(4.5) + sigmoid(-3.6) + sigmoid(1.5),
        sigmoid(4.5) + sigmoid(1.4) + sigmoid(-3),
        sigmoid(-9) + sigmoid(2.2) + sigmoid(1.5),
    ]
    margin = real_model.cycle_margin(readers.POST, *readers.CYCLE)
    assert margin == pytest.approx(min(by_hand) / 3 - 0.5) and margin > 0.07
    # The other way round it is the same cycle; without one there is no margin.
    assert real_model.cycle_margin(readers.POST, *reversed(readers.CYCLE)) == pytest.approx(margin)
    assert real_model.cycle_margin(readers.POST, *readers.CYCLE[:2], "Rex.") < 0


def test_the_post_of_a_prompt():
    """Of a chat template's turns the user's last, without its first paragraph; of a text all."""
    turns = f"system\nYou summarize.\nuser\nSummarize this.\n\n{POST}\nassistant\n"
    assert readers.post_of(turns) == POST
    assert readers.post_of(POST) == POST


# The model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a Llama of width 16 that speaks bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    demos, _ = records(40)
    tokenizer = policies.byte_tokenizer([row["prompt"] for row in demos], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|s|>"]})
    tokenizer.chat_template = (
        "{% for turn in messages %}<|s|>{{ turn.role }}\n{{ turn.content }}{{ eos_token }}\n"
        "{% endfor %}<|s|>assistant\n"
    )
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end, bos_token_id=end, **shape
    )
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_plain_copy(llama, tmp_path):
    """A model that calls itself quantised refuses to be saved. Its copy has the weights, says
    nothing of a file, and is loaded as any policy; it shares no memory with the first."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.config.quantization_config = dict(quant_method="gguf", gguf_file="some.gguf")
    model.config._name_or_path = "a/wrong/name"
    model.config._model_name_or_path = "another"
    copy = real_model.plain(model)
    policies.load(str(llama))[1].save_pretrained(tmp_path)
    copy.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not set(real_model.OF_READING[:3]) & set(written)
    again, _ = policies.load(str(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, copy(ids).logits)
        assert torch.equal(model(ids).logits, again(ids).logits)
        copy.model.norm.weight.zero_()
    assert model.model.norm.weight.all()


def test_a_gguf_file_is_converted(llama, tmp_path):
    """Where gguf is installed: the Llama's weights written as GGUF in float32 come back."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model, tokenizer = policies.load(str(llama))
    real_model.convert(str(as_gguf(gguf, model, tokenizer, tmp_path)), str(tmp_path / "folder"))
    again, _ = policies.load(str(tmp_path / "folder"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-5)


def as_gguf(gguf, model, tokenizer, folder):
    """Writes a Llama of one layer as GGUF, as llama.cpp names and orders its weights; the path."""
    config = model.config
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(1)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    told = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_merges([" ".join(pair) for pair in told["merges"]])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(tokenizer.eos_token_id)
    parts = dict(q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output")
    parts |= dict(gate_proj="ffn_gate", up_proj="ffn_up", down_proj="ffn_down")
    parts |= dict(input_layernorm="attn_norm", post_attention_layernorm="ffn_norm")
    places = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
    for name, weight in model.named_parameters():
        if name not in places:
            places[name] = f"blk.0.{parts[name.split('.')[-2]]}"
        value = weight.detach()
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp turns neighbours, transformers halves.
            heads = config.num_attention_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{places[name]}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_prepare_refuses_a_folder_that_is_there(tmp_path, capsys):
    assert real_model.main(["prepare", str(tmp_path)]) == 2
    assert f"{tmp_path}: is there already" in capsys.readouterr().err


# The posts


def test_posts_are_cut_to_whole_sentences(llama, monkeypatch):
    """TL;DR's labels go; as many sentences stay as fit, one at least; blank lines become spaces."""
    _, tokenizer = policies.load(str(llama))
    text = "SUBREDDIT: r/a\n\nTITLE: My car\n\nPOST: It broke.  Now\n\nwhat? I walk.\n\nTL;DR:"
    monkeypatch.setattr(real_model, "PROMPT_TOKENS", 500)
    assert real_model.shorten(text, tokenizer) == "My car\nIt broke. Now what? I walk."
    assert real_model.shorten("My car\nIt broke.", tokenizer) == "My car\nIt broke."
    lengths = []
    for post in ("My car\nIt broke.", "My car\nIt broke. Now what?"):
        written = real_model.records.apply(tokenizer, real_model.turns(post), True)
        lengths.append(len(tokenizer.encode(written)))
    for most, wanted in ((lengths[1] - 1, "My car\nIt broke."), (lengths[0] - 1, None)):
        monkeypatch.setattr(real_model, "PROMPT_TOKENS", most)
        assert real_model.shorten(text, tokenizer) == wanted


@pytest.mark.usefixtures("small_and_cached")
def test_a_run_and_its_tables(llama, tmp_path, monkeypatch, capsys):
    """Two steps of IPO-MD on few posts: the line's numbers are those of its samples, held-out posts
    are none that are trained on, and the page is written again from the line alone."""
    sizes = dict(HELD_OUT=10, POSTS=60, CYCLES=3, PROMPT_TOKENS=250, RESPONSE_TOKENS=8)
    for name, value in sizes.items():
        monkeypatch.setattr(real_model, name, value)
    few = ["--batch-size", "4", "--max-prompt-tokens", "250", "--max-response-tokens", "8"]
    few += ["--supervised-steps", "0", "--eval-prompts", "4", "--device", "cpu"]
    monkeypatch.setattr(real_model, "OPTIONS", few)
    prompts = [dict(prompt=f"Car {k}\nIt broke again. What now?") for k in range(90)]
    path = write(tmp_path / "posts.jsonl", prompts)
    lines = tmp_path / "real_model.jsonl"
    argv = ["run", "--policy", str(llama), "--prompts", str(path), "--steps", "2"]
    argv += ["--out", str(tmp_path / "runs"), "--results", str(lines)]
    assert real_model.main(argv) == 0, capsys.readouterr().err
    (line,) = [json.loads(text) for text in lines.read_text().splitlines()]
    assert [at["step"] for at in line["curve"]] == [0, 2] and line["curve"][0]["kl"] == 0
    assert line["win_rate"] == pytest.approx(sum(line["readers"].values()) / 3, abs=1e-6)
    assert sum(shown["p"] for shown in line["samples"]) / 10 == pytest.approx(line["win_rate"])
    assert line["cycles"]["triples"] == 12 and line["steps_timed"] == 2 and line["posts"] == 60
    parts = []
    for name in ("posts", "held_out"):
        texts = (tmp_path / "runs" / f"{name}.jsonl").read_text().splitlines()
        parts.append(set(texts))
    assert [len(part) for part in parts] == [60, 10] and not parts[0] & parts[1]
    assert page.main(["--results", str(lines)]) == 0
    assert f"written: {tmp_path / 'real_model.md'}" in capsys.readouterr().out
    written = (tmp_path / "real_model.md").read_text()
    assert written == page.page([line]) and written.count("\n| ") > 25
    assert (tmp_path / "real_model.png").stat().st_size > 5000


def test_what_is_said_of_a_win_rate():
    """0.6 with a standard error of 0.05 reaches down to 0.502, with 0.06 to 0.482."""
    for rate, error, said in ((0.6, 0.05, "beats"), (0.6, 0.06, "not shown"), (0.4, 0.05, "worse")):
        assert said in page.verdict(dict(name="ipo", win_rate=rate, win_rate_se=error))
    assert page.plain_cell("a|b *c* [d](e)") == "a\\|b \\*c\\* \\[d\\](e)"


LINES = Path(real_model.__file__).parent.parent / "results" / "real_model.jsonl"


@pytest.mark.skipif(not LINES.exists(), reason="no run was kept")
def test_the_committed_page_is_written_from_its_lines():
    lines = page.read_lines(LINES).values()
    assert LINES.with_suffix(".md").read_text(encoding="utf-8") == page.page(lines)


def test_too_few_posts(llama, tmp_path, capsys):
    path = write(tmp_path / "posts.jsonl", [dict(prompt="Car\nIt broke.")])
    argv = ["run", "--policy", str(llama), "--prompts", str(path), "--out", str(tmp_path / "runs")]
    assert real_model.main(argv) == 2
    assert "--prompts: 1 posts that fit; give 200 at least" in capsys.readouterr().err
