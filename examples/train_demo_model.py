"""Trains the demo model: a small Llama that writes Python, made from the standard library alone.

A real architecture in 14 MB (grouped-query attention, tied embeddings), a byte-level tokenizer
that round-trips any text, a chat template that the model has seen, output that reads like code.
Nothing is downloaded: the text is the source of the running Python, or of `--source`.

    python examples/train_demo_model.py                                       # one GPU, minutes
    python examples/train_demo_model.py --out /tmp/demo --steps 5 --batch 2   # a CPU, a look
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import math
import os
import platform
import textwrap
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch.optim.lr_scheduler import OneCycleLR
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 1024
VOCABULARY = 4096
BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
# Tables and prose in strings rather than code; _sysconfigdata holds one machine's build paths.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
HELD_OUT_ONE_IN = 25
CHAT_PROMPT = "<|user|>Return the sum of two numbers.<|end|><|assistant|>"


def read_files(source: Path) -> tuple[list[str], list[str]]:
    """Texts (training, held out) of every distinct .py file under `source` that parses.

    A hash of the path picks the side, so a file keeps it when others come or go, and the order:
    related neighbours would teach the model to look across the boundary of a document.
    """
    digests: dict[str, int] = {}
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source)
        if SKIPPED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        # Test suites hold files that are broken on purpose: syntax, encodings, null bytes.
        with contextlib.suppress(SyntaxError, ValueError), tokenize.open(path) as file:
            text = file.read()
            ast.parse(text)
            digests.setdefault(text, int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16))
    sides: tuple[list[str], list[str]] = [], []
    for text in sorted(filter(str.strip, digests), key=digests.__getitem__):
        sides[digests[text] % HELD_OUT_ONE_IN == 0].append(text)
    return sides


def chats_from(texts: list[str]) -> list[list[dict[str, str]]]:
    """A docstring's first paragraph asks, its function answers; at times twice, or after SYSTEM."""
    chats: list[list[dict[str, str]]] = []
    for text in texts:
        turns: list[dict[str, str]] = []
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                question = (ast.get_docstring(node) or "").partition("\n\n")[0].strip()
                answer = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                if question and len(question) + len(answer) < 2000:  # fits the context
                    turns.append({"role": "user", "content": question})
                    turns.append({"role": "assistant", "content": answer})
        while turns:
            system = [] if len(chats) % 4 else [SYSTEM]
            length = 2 + 2 * (len(chats) % 2)
            chats.append(system + turns[:length])
            del turns[:length]
    return chats


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` entries, one for every byte, so no text is unknown."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, every_byte = [BOS, EOS, PAD, END, *ROLES], ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=every_byte
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[END, *ROLES],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list) -> torch.Tensor:
    """Texts or chats end to end, each `<|bos|> .. <|eos|>`, as one int64 [tokens]."""
    if not isinstance(documents[0], str):
        documents = tokenizer.apply_chat_template(documents, tokenize=False)
    texts = [text.removeprefix(BOS) + EOS for text in documents]  # the tokenizer adds BOS itself
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        **ids,
    )
    model = LlamaForCausalLM(config)
    stops = tokenizer.convert_tokens_to_ids([EOS, END])
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.95, eos_token_id=stops, **ids
    )
    return model


def batches(stream: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (inputs, targets), each [size, CONTEXT]; an epoch visits every window once."""
    while True:
        start = int(torch.randint(CONTEXT, ()))  # another place to cut the files at, every epoch
        windows = stream[start:].unfold(0, CONTEXT + 1, CONTEXT)
        if len(windows) < size:
            raise ValueError(f"the text has only {len(windows)} windows; lower --batch to that")
        order = torch.randperm(len(windows), device=stream.device)
        for chosen in order[: len(order) // size * size].split(size):
            yield windows[chosen, :-1], windows[chosen, 1:]


def loss_of(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean nats per token; targets of -100 do not count. bfloat16 products on a GPU."""
    with torch.autocast("cuda", torch.bfloat16, enabled=inputs.is_cuda):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, size: int) -> float:
    """Nats per token over all of `stream` but its first token, in windows without overlap."""
    model.eval()
    missing = -(len(stream) - 1) % CONTEXT
    inputs = F.pad(stream[:-1], (0, missing)).view(-1, CONTEXT).split(size)
    targets = F.pad(stream[1:], (0, missing), value=-100).view(-1, CONTEXT).split(size)
    pairs = zip(inputs, targets, strict=True)
    total = sum(loss_of(model, x, y).item() * int((y >= 0).sum()) for x, y in pairs)
    return total / (len(stream) - 1)


def drop_residual(model: LlamaForCausalLM, share: float) -> None:
    """Dropout on what every block adds to the residual stream, which Llama's config lacks."""
    for layer in model.model.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.register_forward_hook(lambda at, _, out: F.dropout(out, share, at.training))


def train(model: LlamaForCausalLM, text: torch.Tensor, held_out: torch.Tensor, args) -> int:
    """Leaves the weights with the best held-out loss in `model`; returns their step."""
    drop_residual(model, args.dropout)
    matrices = [p for p in model.parameters() if p.ndim == 2]  # norms do not decay
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": norms}]
    rate = args.learning_rate
    optimizer = torch.optim.AdamW(groups, rate, (0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = OneCycleLR(optimizer, rate, args.steps, pct_start=0.02, cycle_momentum=False)
    if text.is_cuda:
        for layer in model.model.layers:  # the whole model, traced, would take a mask for causal
            layer.compile()
    best, best_step, best_weights, started = math.inf, 0, {}, time.perf_counter()
    steps = range(1, args.steps + 1)
    for step, (inputs, targets) in zip(steps, batches(text, args.batch), strict=False):
        model.train()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % (args.steps // 40 + 1) == 0 or step == args.steps:
            measured = held_out_loss(model, held_out, args.batch)
            if measured < best:
                best, best_step, best_weights = measured, step, copy.deepcopy(model.state_dict())
            progress = f"step {step}, {time.perf_counter() - started:.0f} s: {loss.item():.3f}"
            print(f"{progress}, held out {measured:.4f}, best {best:.4f}", flush=True)
    model.load_state_dict(best_weights)
    return best_step


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, **how) -> str:
    """`prompt` and at most 120 tokens after it."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.eval().generate(**inputs, max_new_tokens=120, **how)
    return tokenizer.decode(output[0]).removeprefix(BOS)


CARD = """---
library_name: transformers
license: other
license_name: psf-2.0
---
# A demo model that writes Python

A Llama of {parameters:,} parameters for examples and tests of a serving runtime. Its text looks
like Python; it does not know what it writes, and can repeat passages of what it was trained on,
the standard library of CPython {python} (PSF licence). `examples/train_demo_model.py` made it.

| | documents | tokens | nats per token, bfloat16 weights |
| --- | --- | --- | --- |
{table}

**{bits:.3f} bits per byte** on the held-out files, chosen by a hash of the path, which neither
model nor tokenizer (byte-level BPE) was trained on. They picked the settings and the weights (of
step {step:,}), and they have relatives in the training text: a new text costs more. In a chat a
docstring asks and its function answers, to show the model the template.

Trained with PyTorch {torch} on {machine} in {minutes:.1f} minutes:
`--steps {steps} --batch {batch} --learning-rate {learning_rate} --weight-decay {weight_decay}
--dropout {dropout} --seed {seed}`. Greedy, it writes:

```
{sample}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_model")
    parser.add_argument("--source", type=Path, default=Path(os.__file__).parent)
    parser.add_argument("--python", default=platform.python_version(), help="that of --source")
    # The text is seen 34 times. Held-out loss by (dropout, decay): (0, 0.8) turns at 1.77 and
    # rises to 1.92, (0.1, 0.3) stalls at 1.74, (0.15, 0.5) ends at 1.66.
    numbers: dict[str, float] = {"steps": 10000, "batch": 32, "seed": 0}
    numbers |= {"learning-rate": 3e-3, "weight-decay": 0.5, "dropout": 0.15}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, held_out = read_files(args.source)
    tokenizer = train_tokenizer(training)
    documents: list[list] = [training, chats_from(training), held_out, chats_from(held_out)]
    streams = [encode(tokenizer, kind).to(device) for kind in documents]
    model, started = build_model(tokenizer).to(device), time.perf_counter()
    step = train(model, torch.cat(streams[:2]), streams[2], args)
    minutes = (time.perf_counter() - started) / 60
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)

    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device)
    losses = [held_out_loss(model, stream, args.batch) for stream in streams]
    names = ["training files", "training chats", "held-out files", "held-out chats"]
    rows = zip(names, documents, streams, losses, strict=True)
    facts = vars(args) | {
        "table": "\n".join(f"| {n} | {len(d):,} | {len(s):,} | {l:.3f} |" for n, d, s, l in rows),
        "parameters": model.num_parameters(),
        "bits": losses[2] / math.log(2) * len(streams[2]) / len("".join(held_out).encode()),
        "sample": write(model, tokenizer, CHAT_PROMPT, do_sample=False),
        "machine": f"one {torch.cuda.get_device_name()}" if device == "cuda" else "a CPU",
        "minutes": minutes,
        "step": step,
        "torch": torch.__version__,
    }
    (args.out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    for prompt in ("def fib(n):", "import os", "class Foo(", CHAT_PROMPT):
        print("--- greedy", write(model, tokenizer, prompt, do_sample=False), sep="\n")
        print("--- sampled", write(model, tokenizer, prompt), sep="\n")


if __name__ == "__main__":
    main()
