"""The sampler on other decoders than GPT-2: the law it draws from against plain forward passes.

Tiny random models. Prompts are padded on the left by different numbers, rows end at different
steps, and the reference sampler reads every prefix alone, without padding, cache or batch.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import policy as policies
import sampler
from reference_sampler import END, every_response, uncached_sample

SMALL = dict(
    vocab_size=6,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,  # two heads of queries share it, where the architecture can
    intermediate_size=32,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.4,
    bos_token_id=END,
    eos_token_id=END,
    pad_token_id=END,
)
OWN = {
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "opt": dict(ffn_dim=32, word_embed_proj_dim=16, init_std=0.4),
    "mistral": dict(sliding_window=4),
    "gemma3_text": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
}
KINDS = ["gpt2", "gpt_neox", "opt", "llama", "qwen2", "qwen3", "mistral", "phi3", "falcon"]
KINDS += ["granite", "gemma3_text"]
PROMPTS = [[1, 2, 3, 4, 5, 1, 2], [3], [4, 4, 2]] * 4


def tiny(kind, seed, dtype, **changes):
    """A random model of an architecture, with dropout off."""
    drops = dict(attention_dropout=0.0, hidden_dropout=0.0, dropout=0.0, attn_pdrop=0.0)
    drops |= dict(resid_pdrop=0.0, embd_pdrop=0.0, resid_dropout=0.0)
    given = SMALL | drops | OWN.get(kind, {}) | changes
    if kind == "falcon":
        del given["head_dim"]  # it works that out itself
    config = AutoConfig.for_model(kind, **given)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def laws_of(monkeypatch, pair, beta, limit):
    """What sample draws, and the log-law it draws from at every step, [steps][B, V]."""
    laws, draw = [], sampler.draw

    def record(logits, uniform):
        laws.append(torch.log_softmax(logits.double(), -1))
        return draw(logits, uniform)

    monkeypatch.setattr(sampler, "draw", record)
    prompt, generator = policies.pad(PROMPTS, "left", END), torch.Generator().manual_seed(4)
    ids, mask, _ = sampler.sample(*pair, prompt, beta, generator, limit)
    monkeypatch.undo()
    return policies.Tokens(ids, mask).lists(), laws


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, (0.0, 0.125)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_law_at_every_step(kind, beta, monkeypatch):
    """Relative 1e-10 in float64 and 1e-5 in float32, of log-probabilities of order 1.

    In float64 the responses are equal, too. With a shared cache, pads that are seen or counted, or
    a window that slides over pads, the difference is of order 1.
    """
    worst = {}
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        pair = tiny(kind, 0, dtype), tiny(kind, 1, dtype)
        responses, laws = laws_of(monkeypatch, pair, beta, 10)
        generator = torch.Generator().manual_seed(4)
        slow, slow_laws = uncached_sample(*pair, PROMPTS, beta, generator, 10)
        if dtype == torch.float64:
            assert responses == slow and len({len(response) for response in slow}) > 1
        worst[dtype] = 0.0
        for row, row_laws in enumerate(slow_laws):
            # As far as the two went the same way: in float32 a uniform may fall on an edge.
            same = 1 + len(shared_beginning(responses[row], slow[row]))
            for step, law in enumerate(row_laws[:same]):
                error = ((laws[step][row] - law) / law).abs().max().item()
                worst[dtype] = max(worst[dtype], error)
        assert worst[dtype] < limit
    print(f"{kind}: float32 {worst[torch.float32]:.1e}, float64 {worst[torch.float64]:.1e}")


def shared_beginning(one, other):
    """The tokens that two responses begin with, the same in both."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def test_a_llama_draws_from_its_law():
    """4,000 responses of at most three tokens to one prompt at beta = 0.5 against their exact
    probabilities: Pearson's chi-square over the responses that are expected five times or more."""
    pair = tiny("llama", 0, torch.float64), tiny("llama", 1, torch.float64)
    exact = every_response(*pair, PROMPTS[2], 0.5, 3)
    assert abs(sum(exact.values()) - 1) < 1e-12
    prompt = policies.pad([PROMPTS[2], PROMPTS[0]] * 4000, "left", END)
    ids, mask, _ = sampler.sample(*pair, prompt, 0.5, torch.Generator().manual_seed(1), 3)
    counts = {}
    for response in policies.Tokens(ids, mask).lists()[::2]:
        counts[tuple(response)] = counts.get(tuple(response), 0) + 1
    assert set(counts) <= set(exact)
    square, cells, rest = 0.0, 0, [0, 0.0]
    for response, probability in exact.items():
        if 4000 * probability < 5:
            rest = [rest[0] + counts.get(response, 0), rest[1] + 4000 * probability]
            continue
        square += (counts.get(response, 0) - 4000 * probability) ** 2 / (4000 * probability)
        cells += 1
    square += (rest[0] - rest[1]) ** 2 / rest[1]
    # cells degrees of freedom: mean cells, variance 2 cells; 5 deviations.
    assert cells > 20 and square < cells + 5 * (2 * cells) ** 0.5


RECURRENT = {
    "mamba": dict(state_size=4),
    "mamba2": dict(state_size=4, num_heads=4, head_dim=8, n_groups=1),
    "rwkv": dict(attention_hidden_size=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2),
    "recurrent_gemma": dict(lru_width=16, block_types=["recurrent", "attention"]),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_model_is_refused(kind):
    """Its state runs through the padding: one line says why, before anything is drawn.

    The last two keep keys and values in some layers and a state in others.
    """
    given = dict(vocab_size=6, hidden_size=16, num_hidden_layers=2, eos_token_id=END)
    if kind in ("jamba", "recurrent_gemma"):
        given |= dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=32)
    config = AutoConfig.for_model(kind, **given, **RECURRENT[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = policies.pad(PROMPTS, "left", END)
    if kind == "recurrent_gemma" and getattr(config, "layer_types", None) is None:
        pytest.skip("this transformers lists its layers as if all of them attended")
    with pytest.raises(ValueError, match=f"{type(model).__name__}: cannot be sampled") as error:
        sampler.sample(model, None, prompt, 0.0, torch.Generator().manual_seed(0), 4)
    assert "\n" not in str(error.value)
