"""One tiny deployed model for the whole folder."""

import signal

import pytest
from tiny_models import tiny_model
from toy_tokenizers import CHAT_TEMPLATE, byte_level

from autodeploy import deploy


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A shell starts what it puts in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def model():
    return tiny_model("llama", vocab_size=300)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level(chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def llm(model, tokenizer):
    with deploy(model, tokenizer=tokenizer, max_num_seqs=16) as deployed:
        yield deployed


@pytest.fixture(scope="session")
def poisoned(tokenizer):
    """An LLM with token 77 broken: every sequence that has it gets logits of NaN."""
    model = tiny_model("llama", vocab_size=300)
    model.get_input_embeddings().weight.data[77] = float("nan")
    with deploy(model, tokenizer=tokenizer) as deployed:
        yield deployed


@pytest.fixture(scope="session")
def process_llm(model, tokenizer):
    """The tiny model in a worker process; nobody may kill it."""
    with deploy(model, tokenizer=tokenizer, executor="process") as deployed:
        yield deployed
