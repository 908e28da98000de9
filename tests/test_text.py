"""The caption encoder: vocabulary, errors, shapes, and that it can be trained."""

import pytest
import torch

from python_ref.data.moving_digits import caption_words
from python_ref.models.text import TextEncoder, TextEncoderConfig, Vocabulary, drop_captions


def make_encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextEncoderConfig(words=list(caption_words()), text_len=16, text_dim=32))


def test_words_become_numbers():
    vocabulary = Vocabulary(["a", "3", "moving", "a"], text_len=4)
    assert vocabulary.words == ("a", "3", "moving")
    assert vocabulary.encode(["A 3, moving", ""]).tolist() == [[1, 2, 3, 0], [0, 0, 0, 0]]


def test_unknown_words_and_long_captions_are_named():
    vocabulary = Vocabulary(["a", "3"], text_len=3)
    with pytest.raises(ValueError, match="unknown word 'cat'; accepted: a 3"):
        vocabulary.encode(["a 3", "a cat"])
    with pytest.raises(ValueError, match="has 4 words; accepted: at most text_len = 3"):
        vocabulary.encode(["a 3 a 3"])
    with pytest.raises(ValueError, match="words is empty"):
        Vocabulary([], text_len=3)
    with pytest.raises(ValueError, match="text_dim is 10"):
        TextEncoder(TextEncoderConfig(words=["a"], text_dim=10, num_heads=4))


def test_context_tells_captions_apart_and_word_order():
    encoder = make_encoder()
    context = encoder(["a 3 moving up and a 5 moving left", "a 5 moving up and a 3 moving left", "a 3"])
    assert context.shape == (3, 16, 32)
    assert (context[0] - context[1]).abs().max() > 0.1
    assert (context[0] - context[2]).abs().max() > 0.1
    assert torch.allclose(encoder(["a 3"]), context[2:], atol=1e-6)  # a caption does not see its batch
    assert torch.equal(encoder.uncond(2), encoder(["", ""]))


def test_it_learns():
    """A linear reading of the context can be trained to tell the digit, through every parameter."""
    encoder = make_encoder()
    head = torch.nn.Linear(32, 10)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    captions = [f"a {digit} moving {way}" for digit in range(10) for way in ("up", "left")]
    labels = torch.arange(10).repeat_interleave(2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(head(encoder(captions).mean(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)


def test_captions_are_dropped_by_their_draws():
    assert drop_captions(["a", "b", "c"], torch.tensor([0.05, 0.5, 0.099]), 0.1) == ["", "b", ""]
