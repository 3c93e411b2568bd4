"""Small tokenizers of both common kinds, trained on a few sentences, over 256 token ids."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "the quick brown fox jumps over the lazy dog", "def add(a, b): return a + b",
    "naïve café – größer als Ωmega 日本語 🎉 emoji 👩‍🚀", "numbers 0123456789 and (brackets) [too]",
] * 4  # fmt: skip
SPECIAL = ["<pad>", "<eos>", "<bos>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('no such role') }}"
    "{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_level(vocab_size=300, chat_template=None):
    """Byte-level BPE: any text round-trips; a character may span tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrapped(tokenizer, chat_template)


def metaspace(vocab_size=300):
    """SentencePiece-like BPE with byte fallback: words carry their leading space."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 256, show_progress=False,
        special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    # The trainer makes byte tokens special; in a real vocabulary they are plain.
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] in SPECIAL]
    return _wrapped(Tokenizer.from_str(json.dumps(plain)), None)


def _wrapped(tokenizer, chat_template):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        clean_up_tokenization_spaces=False, chat_template=chat_template,
    )  # fmt: skip
