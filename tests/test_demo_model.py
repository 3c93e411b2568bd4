"""The shipped demo model: loads as any checkpoint does, round-trips text, has learned Python."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FOLDER = Path(__file__).parents[1] / "examples" / "demo_model"

# Written for this test, so that no library holds it.
SNIPPET = '''\
import os
import sys


class Inventory:
    """A count of the files below a directory, by extension."""

    def __init__(self, root, ignored=()):
        self.root = root
        self.ignored = set(ignored)
        self.counts = {}

    def add(self, path):
        name, extension = os.path.splitext(path)
        if extension in self.ignored:
            return False
        self.counts[extension] = self.counts.get(extension, 0) + 1
        return True

    def scan(self):
        for directory, folders, files in os.walk(self.root):
            for name in files:
                self.add(os.path.join(directory, name))
        return self.counts


def main(argv=None):
    if argv is None:
        argv = sys.argv[1:]
    for root in argv:
        inventory = Inventory(root)
        for extension, count in sorted(inventory.scan().items()):
            print(extension, count)


if __name__ == "__main__":
    main()
'''

TEXTS = [
    SNIPPET,
    "",
    " leading and trailing  ",
    "\n\n\ttabs\t and \r\n line ends \r\n",
    "def f(x) :\n    return x , x . y ! ? 's n't\n",
    "naïve café, Ελληνικά, 日本語, עברית, e\u0301",
    "🙂👩‍👩‍👧 \u200b\ufeff\x00\x7f",
    "".join(map(chr, range(0x250))),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_it_is_small_enough_to_ship(model):
    assert 6_000_000 <= model.num_parameters() <= 8_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 16_000_000


def test_weights_are_bfloat16_and_tied(model):
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in list(weights.keys())}
    assert set(dtypes.values()) == {"BF16"}
    assert "lm_head.weight" not in dtypes
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_a_text_opens_with_one_bos(tokenizer):
    assert tokenizer.encode("x").count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id


def test_the_tokenizer_and_the_embedding_have_the_same_size(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_a_chat_renders_to_turns_and_opens_the_answer(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "content": "a + b"},
        {"role": "user", "content": "Product?"},
    ]
    expected = (
        "<|bos|><|system|>Be brief.<|end|><|user|>Sum?<|end|><|assistant|>a + b<|end|>"
        "<|user|>Product?<|end|><|assistant|>"
    )
    how = {"add_generation_prompt": True}
    assert tokenizer.apply_chat_template(chat, tokenize=False, **how) == expected
    tokens = tokenizer.apply_chat_template(chat, return_dict=False, **how)
    marks = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    counts = [tokens.count(tokenizer.convert_tokens_to_ids(mark)) for mark in marks]
    assert counts == [1, 1, 2, 2, 4]


def test_generation_stops_at_the_end_of_a_text_and_of_a_turn(tokenizer):
    config = GenerationConfig.from_pretrained(FOLDER)
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"])
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.do_sample


@torch.no_grad()
def test_it_has_learned_python(tokenizer, model):
    tokens = tokenizer(SNIPPET, return_tensors="pt").input_ids
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss < 1.8  # 1.62 nats per token; log(4096) is 8.3


@torch.no_grad()
def test_it_answers_a_chat_with_a_function(tokenizer, model):
    question = [{"role": "user", "content": "Return the sum of two numbers."}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer.startswith("def ")
