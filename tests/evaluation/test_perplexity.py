"""Each target is counted once, with the context that the protocol says, against the logits of the model."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba_train.config_data import DataConfig, DataSource
from mamba_train.data.corpus import Corpus
from mamba_train.data.prepare import prepare
from mamba_train.data.tokenizer import TextTokenizer, load_tokenizer
from mamba_train.evaluation.lengths import score_lengths
from mamba_train.evaluation.perplexity import Protocol, Windows, losses_of, score
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM
from tests.model.families import small_config

LN_2 = math.log(2)


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataConfig(
        name="x",
        source=DataSource.local,
        path=str(corpus),
        vocab_size=300,
        validation_fraction=0.02,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )
    return prepare(data, lambda line: None)


@pytest.fixture(scope="module")
def text(prepared: Path) -> tuple[Corpus, TextTokenizer]:
    return Corpus.open(prepared, "validation"), load_tokenizer(prepared / "tokenizer.json")


@pytest.fixture(scope="module")
def model() -> MambaLM:
    config = small_config("mamba1", vocab_size=300)
    model = MambaLM(config)
    initialise_(model, config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 60))
def test_each_target_counts_once_with_the_context_it_was_promised(n: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    for windows in (Windows(Protocol.packed, length), Windows(Protocol.sliding, length, stride)):
        places = list(windows.places(n))
        counted = [target for _, first, end in places for target in range(first, end)]
        assert counted == list(range(n))
        for begin, first, end in places:
            assert 0 <= begin <= first < end <= begin + length
            if windows.protocol is Protocol.packed:
                assert begin == first
            elif first > 0:
                assert first - begin >= min(length - stride, first), "less context than promised"


@pytest.mark.parametrize("protocol", [Protocol.packed, Protocol.sliding])
def test_nats_and_bytes_are_those_of_a_plain_loop(
    text: tuple[Corpus, TextTokenizer], model: MambaLM, protocol: Protocol
) -> None:
    corpus, tokenizer = text
    tokens = torch.from_numpy(corpus.tokens(200).astype(np.int64))
    length, stride = 32, 8
    nats = 0.0
    for target in range(1, 200):  # by definition: the window of each target, one at a time
        if protocol is Protocol.packed:
            begin = (target - 1) // length * length
        else:
            end = length if target <= length else length + -(-(target - length) // stride) * stride
            begin = max(0, min(end, 199) - length)
        logits = model(tokens[None, begin:target])[0, -1]
        nats -= float(torch.log_softmax(logits, -1)[tokens[target]])
    windows = Windows(protocol, length, stride if protocol is Protocol.sliding else None, max_tokens=199, batch_size=3)
    found = score(corpus, tokenizer, losses_of(model), windows)
    assert found.n_targets == 199
    assert found.nats == pytest.approx(nats, rel=1e-4)
    assert found.n_bytes == tokenizer.n_bytes(tokens[1:].numpy())
    assert found.bits_per_byte == pytest.approx(nats / LN_2 / found.n_bytes, rel=1e-4)


def test_documents_are_reset_when_asked_for(text: tuple[Corpus, TextTokenizer], model: MambaLM) -> None:
    corpus, tokenizer = text
    reset, leaking = (
        score(corpus, tokenizer, losses_of(model), Windows(Protocol.packed, 4000, reset_at_documents=reset)).nats
        for reset in (True, False)
    )
    tokens = corpus.tokens().astype(np.int64)[:4001]
    ends = [0, *(np.flatnonzero(tokens[:-1] == corpus.eos_id) + 1).tolist(), len(tokens) - 1]
    assert len(ends) > 3
    apart = 0.0
    for begin, end in itertools.pairwise(ends):
        piece = torch.from_numpy(tokens[None, begin : end + 1])
        apart += float(model(piece[:, :-1], piece[:, 1:]))
    first = score(corpus, tokenizer, losses_of(model), Windows(Protocol.packed, 4000, None, True, 4000)).nats
    assert first == pytest.approx(apart, rel=1e-4)
    assert abs(reset - leaking) > 1


def test_lengths_score_the_same_targets(text: tuple[Corpus, TextTokenizer], model: MambaLM) -> None:
    corpus, tokenizer = text
    curve = score_lengths(corpus, tokenizer, losses_of(model), [16, 64, 256], max_tokens=600)
    assert {one.n_targets for one in curve.scores.values()} == {512}
    assert len({one.n_bytes for one in curve.scores.values()}) == 1
    long = curve.scores[256]
    spans = curve.by_position()
    assert [(first, last) for first, last, _ in spans][:4] == [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert sum((last - first + 1) * nats for first, last, nats in spans) == pytest.approx(long.nats / 2)
    # The first 16 positions of a long window see what those of every sixteenth short one see.
    short = score(corpus, tokenizer, losses_of(model), Windows(Protocol.packed, 16, max_tokens=16))
    assert len(short.by_position) == 16
    with pytest.raises(ValueError, match="--lengths 100000"):
        score_lengths(corpus, tokenizer, losses_of(model), [100000], max_tokens=None)


def test_windows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Windows(Protocol.packed, 0)
    for stride in (None, 0, 33):
        with pytest.raises(ValueError, match="stride"):
            Windows(Protocol.sliding, 32, stride)
