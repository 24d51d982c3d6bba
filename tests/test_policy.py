"""log_prob against hand-made laws and transformers row by row, and what must not move a score."""

import ast
import copy
import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import policy as policies
import reference_sampler
from policy import Tokens, log_prob, pad, token_log_probs
from reference_sampler import END, constant_gpt2, gpt2

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [[1, 2, 3, 4], [2], [4, 1]]
RESPONSES = [[3, END], [1, 1, 2, 4], [END]]  # the second was cut: no end-of-text


@pytest.fixture(scope="module")
def model():
    return gpt2(0)


def batch(prompts=PROMPTS, responses=RESPONSES, fill=END):
    return pad(prompts, "left", fill), pad(responses, "right", fill)


@torch.no_grad()
def by_hand(model, prompt, response):
    """Token log-probabilities of one response through transformers.

    One unpadded row, all logits, log-softmax, a loop.
    """
    logp = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0], -1)
    return [logp[len(prompt) + n - 1, token].item() for n, token in enumerate(response)]


def test_a_known_bigram_law():
    """A stand-in model reads next-token probabilities from a table by the current token alone.

    The score is a product of four table entries. A shift by one, the prompt's tokens or a missing
    end-of-text each give another product. 1e-12.
    """
    table = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.7, 0.2], [0.6, 0.15, 0.25]], dtype=torch.float64)

    class Bigram(torch.nn.Module):
        def forward(self, input_ids, logits_to_keep, **_):
            logits = table.log() + 3.0  # + 3: logits are not normalised
            return SimpleNamespace(logits=logits[input_ids][:, logits_to_keep])

    bigram = Bigram()
    prompt, response = batch([[1, 2], [1]], [[1, 2, END], [2]])
    each = token_log_probs(bigram, prompt, response).exp()
    # 1 after 2, 2 after 1, end after 2
    assert each[0].tolist() == pytest.approx([0.15, 0.2, 0.6], rel=1e-12)
    # 2 after 1, and no end-of-text: it was cut
    assert each[1].tolist() == pytest.approx([0.2, 1, 1], rel=1e-12)
    total = log_prob(bigram, prompt, response).exp()
    assert total.tolist() == pytest.approx([0.15 * 0.2 * 0.6, 0.2], rel=1e-12)


def test_a_known_constant_law():
    """A real GPT-2 that draws from (0.1, 0.2, 0.3, 0.4) everywhere.

    'b a <end>' has 0.3 * 0.2 * 0.1, to 1e-12 relative.
    """
    model = constant_gpt2(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log())
    score = log_prob(model, *batch([[3, 1]], [[2, 1, END]]))
    assert score.exp().item() == pytest.approx(0.006, rel=1e-12)


def test_a_padded_batch_against_rows_alone(model):
    """Left and right padding together against transformers on every row alone, in float64 to 1e-12.

    Without position ids from the mask the difference is of order 1. In float32 to 1e-4, some
    hundred roundings of values of order 10.
    """
    prompt, response = batch()
    each = token_log_probs(model, prompt, response)
    for row, (x, y) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected = by_hand(model, x, y)
        assert each[row, : len(y)].tolist() == pytest.approx(expected, abs=1e-12)
        assert (each[row, len(y) :] == 0).all()
        alone = log_prob(model, *batch([x], [y])).item()
        assert alone == pytest.approx(each[row].sum().item(), abs=1e-12)
    single = log_prob(copy.deepcopy(model).float(), prompt, response)
    torch.testing.assert_close(single.double(), each.sum(1), rtol=0, atol=1e-4)
    wrong = model(
        torch.cat([prompt.ids, response.ids], 1),
        attention_mask=torch.cat([prompt.mask, response.mask], 1).long(),
    ).logits
    difference = torch.log_softmax(wrong[1, 3], -1)[1] - each[1, 0]
    assert difference.abs().item() > 0.01, "positions do not matter to this model"


def test_what_follows_the_end_is_not_scored(model):
    """[a, EOS, junk] as a sampler may hold it, masked through EOS, scores as [a, EOS]: 1e-12.

    The EOS term is in.
    """
    prompt, short = batch([[1, 2]], [[3, END]])
    junk = Tokens(torch.tensor([[3, END, 4, 1]]), torch.tensor([[True, True, False, False]]))
    score = log_prob(model, prompt, short).item()
    assert log_prob(model, prompt, junk).item() == pytest.approx(score, abs=1e-12)
    terms = by_hand(model, [1, 2], [3, END])
    assert score == pytest.approx(sum(terms), abs=1e-12)
    assert terms[1] < -0.01


def test_a_cut_response_has_no_end(model):
    """[a, b] cut at the limit scores two terms; with EOS sampled, one more, log pi(EOS | x, a, b).

    1e-12.
    """
    prompt, cut = batch([[1, 2]], [[3, 4]])
    ended = pad([[3, 4, END]], "right", END)
    terms = by_hand(model, [1, 2], [3, 4, END])
    score = log_prob(model, prompt, cut)
    assert score.item() == pytest.approx(sum(terms[:2]), abs=1e-12)
    more = log_prob(model, prompt, ended) - score
    assert more.item() == pytest.approx(terms[2], abs=1e-12)


def test_the_pad_id_is_irrelevant(model):
    """The same batch padded with end-of-text, as GPT-2 does, and with any other id.

    Bit for bit, since a masked key weighs 0.
    """
    scores = [token_log_probs(model, *batch(fill=fill)) for fill in range(5)]
    assert all(torch.equal(score, scores[0]) for score in scores)


def test_more_padding_moves_nothing(model):
    """Ten more columns of padding on either side move no score.

    1e-12, since sums are over other lengths.
    """
    prompt, response = batch()
    pads = torch.zeros(3, 10, dtype=torch.long)
    never = torch.zeros(3, 10, dtype=torch.bool)
    wide_prompt = Tokens(torch.cat([pads, prompt.ids], 1), torch.cat([never, prompt.mask], 1))
    wide_response = Tokens(
        torch.cat([response.ids, pads + 3], 1), torch.cat([response.mask, never], 1)
    )
    wide = log_prob(model, wide_prompt, wide_response)
    torch.testing.assert_close(wide, log_prob(model, prompt, response), rtol=0, atol=1e-12)


def test_no_mask_is_made_from_the_pad_id():
    """Lint: no comparison in the project's files mentions a pad id.

    Masks come from positions and lengths.
    """
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "pad_token" not in text and "pad_id" not in text, f"{path.name}: {text}"


def test_scores_do_not_depend_on_the_batch(model):
    """Twelve rows at once, and by 1, 5 and 6: 1e-12.

    Evaluation chunks and micro-batches rest on it.
    """
    prompt, response = batch(PROMPTS * 4, RESPONSES * 4)
    whole = log_prob(model, prompt, response)
    for sizes in ([1] * 12, [5, 5, 2], [6, 6]):
        parts = []
        for rows in torch.arange(12).split(sizes):
            parts.append(log_prob(model, prompt.rows(rows), response.rows(rows)))
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_step_0_log_ratio_is_exactly_zero(model):
    """Policy and reference with the same weights give the same bits.

    One has gradient and one has none, as in training.
    """
    policy = copy.deepcopy(model).float()
    reference = copy.deepcopy(model).float().requires_grad_(False)
    ratio = log_prob(policy.train(), *batch()) - log_prob(reference, *batch())
    assert ratio.requires_grad and torch.equal(ratio, torch.zeros(3))


def test_precision(model):
    """bfloat16 weights: the score is float32 and near a float64 log-softmax of the same logits.

    Within 1e-4, while a log-softmax in bfloat16 is off by more than 1e-2; float32 and float64 come
    out as they went in.
    """
    half = copy.deepcopy(model).bfloat16()
    # No padding, so that the call below is the same.
    prompt, response = batch([[1, 2, 3]] * 2, [[3, 4, 1, 2, END], [2, 2, 1, 4, 3]])
    score = log_prob(half, prompt, response)
    with torch.no_grad():
        logits = half(torch.cat([prompt.ids, response.ids], 1)).logits[:, 2:-1]
    assert logits.dtype == torch.bfloat16
    assert score.dtype == torch.float32
    ids = response.ids[..., None]
    exact = torch.log_softmax(logits.double(), -1).gather(2, ids).sum((1, 2))
    coarse = torch.log_softmax(logits, -1).gather(2, ids).sum((1, 2))
    assert (score - exact).abs().max() < 1e-4
    assert (coarse - exact).abs().max() > 1e-2
    assert log_prob(model, prompt, response).dtype == torch.float64
    assert log_prob(copy.deepcopy(model).float(), prompt, response).dtype == torch.float32


def test_the_head_runs_at_response_positions_only(model):
    """The head sees B x T positions.

    [B, P + T, vocabulary] logits would not fit in memory with GPT-2's 50,257 entries.
    """
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape)
    )
    log_prob(model, *batch())
    handle.remove()
    assert [tuple(shape) for shape in seen] == [(3, 4, 16)]


def test_dropout_is_off_in_every_model(tmp_path):
    """Built or loaded, even from a folder that asks for dropout 0.1, as gpt2 does.

    Two forward passes in train mode agree to the bit. With dropout the step-0 log-ratio is not 0
    and the loss does not see what was sampled.
    """
    words = policies.word_tokenizer(["a", "b", "c", "d"])
    asks = gpt2(0, dropout=0.1).float()
    folder = tmp_path / "asks"
    asks.save_pretrained(folder)
    words.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["attn_pdrop"] == 0.1
    loaded, tokenizer = policies.load(str(folder))
    assert tokenizer.get_vocab() == words.get_vocab()
    assert not loaded.training
    for model in (loaded.train(), policies.build("tiny", words, 16, 0).train()):
        with torch.no_grad():
            assert torch.equal(log_prob(model, *batch()), log_prob(model, *batch()))
    with torch.no_grad():
        found = log_prob(loaded, *batch())
        wanted = log_prob(asks.eval(), *batch())
    # The same weights, though the folder asks for another kernel of the same gelu: 1e-4, float32.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_building_depends_on_the_seed_alone():
    """Two builds of a seed are equal to the bit whatever the global random state.

    They leave it as it was.
    """
    words = policies.word_tokenizer(["a", "b"])
    torch.manual_seed(1)
    once = policies.build("tiny", words, 8, 5)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    again = policies.build("tiny", words, 8, 5)
    other = policies.build("tiny", words, 8, 6)
    for name, value in once.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(once.transformer.wte.weight, other.transformer.wte.weight)


def test_pad_and_positions_by_hand():
    left = pad([[5, 6], [7]], "left", 9)
    right = pad([[5, 6], [7]], "right", 9)
    assert left.ids.tolist() == [[5, 6], [9, 7]]
    assert left.mask.tolist() == [[True, True], [False, True]]
    assert right.ids.tolist() == [[5, 6], [7, 9]]
    assert right.mask.tolist() == [[True, True], [True, False]]
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert policies.positions(mask)[0].tolist() == [0, 0, 0, 1]


def test_tokens_by_hand():
    """Rows by slice and by tensor, repeated ones too; whole batches in turn; lengths and lists.

    The last token is an end-of-text with the pads' id: only the mask tells them apart.
    """
    rows = [[5, 6, 9], [7], [8, 9]]
    for side in ("left", "right"):
        tokens = pad(rows, side, 9)
        assert tokens.lengths().tolist() == [3, 1, 2]
        assert tokens.lists() == rows
        for index, kept in (
            (slice(1, None), [1, 2]),
            (slice(2), [0, 1]),
            (torch.tensor([2, 0, 2]), [2, 0, 2]),
        ):
            some = tokens.rows(index)
            assert isinstance(some, Tokens)
            assert some.lists() == [rows[k] for k in kept]
            assert some.ids.shape == some.mask.shape == (len(kept), 3)
        twice = tokens.repeat(2)
        assert isinstance(twice, Tokens)
        assert twice.lists() == [*rows, *rows]
        assert torch.equal(twice.ids[3:], tokens.ids)


def test_tokens_move_together():
    """Both tensors go where they are sent; meta is a device that every machine has."""
    moved = pad([[1, 2], [3]], "left", 0).to("meta")
    assert isinstance(moved, Tokens)
    assert moved.ids.device.type == moved.mask.device.type == "meta"
    assert moved.ids.shape == moved.mask.shape == (2, 2)
    tokens = pad([[1]], "left", 0)
    assert tokens.to("cpu").ids is tokens.ids, "nothing to move: the same tensor"


def test_tokenizers_round_trip():
    """The built-in tokenizer has one token a word and end-of-text.

    The byte-level one gives any text back, also what it never saw, and holds its size.
    """
    words = policies.word_tokenizer(["car", "door"])
    assert words.encode("door car <|endoftext|>") == [2, 1, 0]
    assert words.eos_token_id == END
    many = policies.byte_tokenizer(["the cat sat on the mat " * 5] * 20, size=300)
    for text in ("the cat", " été\n\t\u4f60\u597d 🙂 the", "a  b"):
        assert many.decode(many.encode(text)) == text
    assert len(many) <= 300
    assert many.eos_token_id is not None


def test_loading_says_what_is_wrong(tmp_path):
    """A folder that is none, an empty one, another architecture: ValueError naming the source."""
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "nowhere"), str(tmp_path / "empty")):
        with pytest.raises(ValueError, match=source):
            policies.load(source)


def test_the_reference_sampler_is_right():
    """The slow sampler's law of a constant model at beta = 0.5, worked out by hand.

    It is sqrt(p q), normalised. That sampler judges the other.
    """
    p, q = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64)
    pair = constant_gpt2(p.log()), constant_gpt2(q.log())
    law = reference_sampler.next_law(*pair, [1, 2], 0.5).exp()
    roots = [0.16**0.5, 0.03**0.5, 0.05**0.5]
    assert law.tolist() == pytest.approx([root / sum(roots) for root in roots], rel=1e-12)


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch):
    """A connection is refused, by a port that nobody listens at: none of the client's retries, and
    the answer is remembered; through a proxy, or of a folder, nothing is tried out here."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and no listen
        here = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", here)
        tried, connect = [], socket.create_connection

        def watched(address, *given, **named):
            tried.append(address)
            return connect(address, *given, **named)

        monkeypatch.setattr(socket, "create_connection", watched)
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a retry"))
        policies.is_reached.cache_clear()
        for load, expected in ((policies.load_tokenizer, "tokenizer"), (policies.load, "policy")):
            with pytest.raises(ValueError, match=f"nobody/nothing: cannot load a {expected}: "):
                load("nobody/nothing")
        tried.clear()
        assert not policies.is_reached("nobody/nothing") and not tried  # it is remembered
        unheard.listen()
        policies.is_reached.cache_clear()
        assert policies.is_reached("nobody/nothing") and policies.is_reached(".")
        assert len(tried) == 1
        monkeypatch.setenv("https_proxy", here)
        assert policies.is_reached("nobody/else") and len(tried) == 1
    policies.is_reached.cache_clear()
