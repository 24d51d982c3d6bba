"""log_prob against hand-made laws and against transformers row by row, and what must not move a score."""

import ast
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference_sampler
import torch
from reference_sampler import END, constant_gpt2, gpt2

import policy as policies
from policy import log_prob, pad, token_log_probs

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, RESPONSES = (
    [[1, 2, 3, 4], [2], [4, 1]],
    [[3, END], [1, 1, 2, 4], [END]],
)  # the second was cut: no end-of-text


@pytest.fixture(scope="module")
def model():
    return gpt2(0)


def batch(prompts=PROMPTS, responses=RESPONSES, fill=END):
    return pad(prompts, "left", fill), pad(responses, "right", fill)


@torch.no_grad()
def by_hand(model, prompt, response):
    """Token log-probabilities of one response through transformers: one unpadded row, all logits, log-softmax, a loop."""
    logp = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0], -1)
    return [logp[len(prompt) + n - 1, token].item() for n, token in enumerate(response)]


def test_a_known_bigram_law():
    """A stand-in model whose next-token probabilities are read from a table by the current token alone: the score is a product
    of four table entries. A shift by one, the prompt's tokens or a missing end-of-text each give another product. 1e-12."""
    table = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.7, 0.2], [0.6, 0.15, 0.25]], dtype=torch.float64)

    def bigram(input_ids, logits_to_keep, **_):
        return SimpleNamespace(
            logits=(table.log() + 3.0)[input_ids][:, logits_to_keep]
        )  # + 3: logits are not normalised

    each = token_log_probs(bigram, *batch([[1, 2], [1]], [[1, 2, END], [2]])).exp()
    assert each[0].tolist() == pytest.approx(
        [0.15, 0.2, 0.6], rel=1e-12
    )  # 1 after 2, 2 after 1, end after 2
    assert each[1].tolist() == pytest.approx(
        [0.2, 1, 1], rel=1e-12
    )  # 2 after 1, and no end-of-text: it was cut
    total = log_prob(bigram, *batch([[1, 2], [1]], [[1, 2, END], [2]])).exp()
    assert total.tolist() == pytest.approx([0.15 * 0.2 * 0.6, 0.2], rel=1e-12)


def test_a_known_constant_law():
    """A real GPT-2 that draws from (0.1, 0.2, 0.3, 0.4) everywhere: 'b a <end>' has 0.3 * 0.2 * 0.1, to 1e-12 relative."""
    model = constant_gpt2(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log())
    assert log_prob(model, *batch([[3, 1]], [[2, 1, END]])).exp().item() == pytest.approx(
        0.006, rel=1e-12
    )


def test_a_padded_batch_against_rows_alone(model):
    """Left and right padding together against transformers on every row alone, in float64 to 1e-12: without position ids from
    the mask the difference is of order 1. In float32 to 1e-4, some hundred roundings of values of order 10."""
    each = token_log_probs(model, *batch())
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        assert each[row, : len(response)].tolist() == pytest.approx(
            by_hand(model, prompt, response), abs=1e-12
        )
        assert (each[row, len(response) :] == 0).all()
        alone = log_prob(model, *batch([prompt], [response])).item()
        assert alone == pytest.approx(each[row].sum().item(), abs=1e-12)
    single = copy.deepcopy(model).float()
    torch.testing.assert_close(log_prob(single, *batch()).double(), each.sum(1), rtol=0, atol=1e-4)
    wrong = model(
        torch.cat([batch()[0][0], batch()[1][0]], 1),
        attention_mask=torch.cat([batch()[0][1], batch()[1][1]], 1).long(),
    ).logits
    assert abs(torch.log_softmax(wrong[1, 3], -1)[1].item() - each[1, 0].item()) > 0.01, (
        "positions do not matter to this model"
    )


def test_what_follows_the_end_is_not_scored(model):
    """[a, EOS, junk] as a sampler may hold it, masked through EOS, scores as [a, EOS], junk or not: 1e-12. The EOS term is in."""
    prompt, short = batch([[1, 2]], [[3, END]])
    junk = torch.tensor([[3, END, 4, 1]]), torch.tensor([[True, True, False, False]])
    assert log_prob(model, prompt, junk).item() == pytest.approx(
        log_prob(model, prompt, short).item(), abs=1e-12
    )
    terms = by_hand(model, [1, 2], [3, END])
    assert (
        log_prob(model, prompt, short).item() == pytest.approx(sum(terms), abs=1e-12)
        and terms[1] < -0.01
    )


def test_a_cut_response_has_no_end(model):
    """[a, b] cut at the limit scores two terms; the same with EOS sampled scores one more, log pi(EOS | x, a, b): 1e-12."""
    prompt, cut = batch([[1, 2]], [[3, 4]])
    ended = pad([[3, 4, END]], "right", END)
    terms = by_hand(model, [1, 2], [3, 4, END])
    assert log_prob(model, prompt, cut).item() == pytest.approx(sum(terms[:2]), abs=1e-12)
    assert (log_prob(model, prompt, ended) - log_prob(model, prompt, cut)).item() == pytest.approx(
        terms[2], abs=1e-12
    )


def test_the_pad_id_is_irrelevant(model):
    """The same batch padded with end-of-text, as GPT-2 does, and with any other id: bit for bit, since a masked key weighs 0."""
    scores = [token_log_probs(model, *batch(fill=fill)) for fill in range(5)]
    assert all(torch.equal(score, scores[0]) for score in scores)


def test_more_padding_moves_nothing(model):
    """Ten more columns of padding on either side move no score: 1e-12, since sums are over other lengths."""
    (ids, mask), (response, there) = batch()
    wide = torch.zeros(3, 10, dtype=torch.long)
    prompt, longer = (
        (torch.cat([wide, ids], 1), torch.cat([wide > 0, mask], 1)),
        (torch.cat([response, wide + 3], 1), torch.cat([there, wide > 0], 1)),
    )
    torch.testing.assert_close(
        log_prob(model, prompt, longer), log_prob(model, *batch()), rtol=0, atol=1e-12
    )


def test_no_mask_is_made_from_the_pad_id():
    """Lint: no comparison in the project's files mentions a pad id; masks come from positions and lengths."""
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                assert "pad_token" not in ast.unparse(node) and "pad_id" not in ast.unparse(node), (
                    f"{path.name}: {ast.unparse(node)}"
                )


def test_scores_do_not_depend_on_the_batch(model):
    """Twelve rows at once, and by 1, 5 and 6: 1e-12. Evaluation chunks and micro-batches rest on it."""
    prompt, response = batch(PROMPTS * 4, RESPONSES * 4)
    whole = log_prob(model, prompt, response)
    for sizes in ([1] * 12, [5, 5, 2], [6, 6]):
        parts = zip(*(part.split(sizes) for part in (*prompt, *response)), strict=True)
        split = torch.cat([log_prob(model, (a, b), (c, d)) for a, b, c, d in parts])
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-12)


def test_step_0_log_ratio_is_exactly_zero(model):
    """Policy and reference with the same weights, one with gradient and one without, as in training: the bits are the same."""
    policy, reference = (
        copy.deepcopy(model).float(),
        copy.deepcopy(model).float().requires_grad_(False),
    )
    ratio = log_prob(policy.train(), *batch()) - log_prob(reference, *batch())
    assert ratio.requires_grad and torch.equal(ratio, torch.zeros(3))


def test_precision(model):
    """bfloat16 weights: the score is float32 and within 1e-4 of a float64 log-softmax of the same logits, while a log-softmax
    in bfloat16 is off by more than 1e-2; float32 and float64 come out as they went in."""
    half = copy.deepcopy(model).bfloat16()
    prompt, response = batch(
        [[1, 2, 3]] * 2, [[3, 4, 1, 2, END], [2, 2, 1, 4, 3]]
    )  # no padding, so that the call below is the same
    score = log_prob(half, prompt, response)
    with torch.no_grad():
        logits = half(torch.cat([prompt[0], response[0]], 1)).logits[:, 2:-1]
    assert logits.dtype == torch.bfloat16 and score.dtype == torch.float32
    exact = torch.log_softmax(logits.double(), -1).gather(2, response[0][..., None]).sum((1, 2))
    coarse = torch.log_softmax(logits, -1).gather(2, response[0][..., None]).sum((1, 2))
    assert (score - exact).abs().max() < 1e-4 and (coarse - exact).abs().max() > 1e-2
    assert log_prob(model, prompt, response).dtype == torch.float64
    assert log_prob(copy.deepcopy(model).float(), prompt, response).dtype == torch.float32


def test_the_head_runs_at_response_positions_only(model):
    """[B, P + T, vocabulary] logits would not fit in memory with GPT-2's 50,257 entries: the head sees B x T positions."""
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape)
    )
    log_prob(model, *batch())
    handle.remove()
    assert [tuple(shape) for shape in seen] == [(3, 4, 16)]


def test_dropout_is_off_in_every_model(tmp_path):
    """Built or loaded, even from a folder that asks for dropout 0.1, as gpt2 does: two forward passes in train mode agree to
    the bit. With dropout the step-0 log-ratio is not 0 and the loss does not see what was sampled."""
    words = policies.word_tokenizer(["a", "b", "c", "d"])
    asks = gpt2(0, dropout=0.1).float()
    asks.save_pretrained(tmp_path / "asks")
    words.save_pretrained(tmp_path / "asks")
    assert json.loads((tmp_path / "asks" / "config.json").read_text())["attn_pdrop"] == 0.1
    loaded, tokenizer = policies.load(str(tmp_path / "asks"))
    assert tokenizer.get_vocab() == words.get_vocab() and not loaded.training
    for model in (loaded.train(), policies.build("tiny", words, 16, 0).train()):
        with torch.no_grad():
            assert torch.equal(log_prob(model, *batch()), log_prob(model, *batch()))
    with torch.no_grad():  # the same weights, though the folder asks for dropout and another kernel of the same gelu: 1e-4, float32
        torch.testing.assert_close(
            log_prob(loaded, *batch()), log_prob(asks.eval(), *batch()), rtol=0, atol=1e-4
        )


def test_building_depends_on_the_seed_alone():
    """Two builds of a seed are equal to the bit whatever the global random state, which they leave as it was."""
    words = policies.word_tokenizer(["a", "b"])
    torch.manual_seed(1)
    first, state = policies.build("tiny", words, 8, 5), torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    again, other = policies.build("tiny", words, 8, 5), policies.build("tiny", words, 8, 6)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)


def test_pad_and_positions_by_hand():
    left, right = pad([[5, 6], [7]], "left", 9), pad([[5, 6], [7]], "right", 9)
    assert left[0].tolist() == [[5, 6], [9, 7]] and left[1].tolist() == [
        [True, True],
        [False, True],
    ]
    assert right[0].tolist() == [[5, 6], [7, 9]] and right[1].tolist() == [
        [True, True],
        [True, False],
    ]
    assert policies.positions(
        torch.tensor([[False, False, True, True], [True, True, True, False]])
    )[0].tolist() == [0, 0, 0, 1]


def test_tokenizers_round_trip():
    """The built-in tokenizer has one token a word and end-of-text; the byte-level one gives any text back, also what it never
    saw, and holds its size."""
    words = policies.word_tokenizer(["car", "door"])
    assert words.encode("door car <|endoftext|>") == [2, 1, 0] and words.eos_token_id == END
    many = policies.byte_tokenizer(["the cat sat on the mat " * 5] * 20, size=300)
    for text in ("the cat", " été\n\t\u4f60\u597d 🙂 the", "a  b"):
        assert many.decode(many.encode(text)) == text
    assert len(many) <= 300 and many.eos_token_id is not None


def test_loading_says_what_is_wrong(tmp_path):
    """A folder that is none, an empty one, another architecture: ValueError naming the source."""
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "nowhere"), str(tmp_path / "empty")):
        with pytest.raises(ValueError, match=source):
            policies.load(source)


def test_the_reference_sampler_is_right():
    """The slow sampler's law of a constant model at beta = 0.5, worked out by hand: sqrt(p q) normalised. It judges the rest."""
    p, q = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64)
    law = reference_sampler.next_law(
        constant_gpt2(p.log()), constant_gpt2(q.log()), [1, 2], 0.5
    ).exp()
    assert law.tolist() == pytest.approx(
        [v / (0.16**0.5 + 0.03**0.5 + 0.05**0.5) for v in (0.16**0.5, 0.03**0.5, 0.05**0.5)],
        rel=1e-12,
    )
