"""One tiny deployed model for the whole folder."""

import pytest
from tiny_models import tiny_model
from toy_tokenizers import CHAT_TEMPLATE, byte_level

from autodeploy import deploy


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


def pages_used(engine):
    """Pages held now, counting what aborts have released by themselves."""
    core = engine._executor._engine
    core.step()
    return core.stats().pages_used
