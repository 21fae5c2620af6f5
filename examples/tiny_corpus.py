"""The text examples/tiny-llama learns from, and its tokenizer.

The text is Python's own standard library, because every machine that runs this has it. Files are split by name, so that a held-out file
stays held out whatever the order of the folder, the seed or the Python version. Nothing here needs more than torch and tokenizers.
"""
import hashlib
import os
import random
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, VOCAB = "<|begin|>", "<|end|>", 2048
CONTEXT = 1024                                           # tokens

# Tests, data tables, other people's packages, and a second copy of tokenize.py: not code a person would write, or not held out if held out.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data", "__phello__", "_vendor",
    "pgen2",
}
SKIPPED_FILES = ("_sysconfigdata", "html/entities.py", "re/_casefix.py", "stringprep.py", "this.py", "__phello__")


def read_corpus():
    """Returns (train, held_out), each a list of (relative path, text); about 2 % of the files, by their path's hash, are held out."""
    root = Path(os.__file__).parent
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(name.split("/")[:-1]) or any(mark in name for mark in SKIPPED_FILES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:                       # a few old files declare another encoding
            continue
        if len(text) < 200:
            continue
        chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 50 == 0
        (held_out if chosen else train).append((name, text))
    return train, held_out


def train_tokenizer(texts):
    """Byte-level BPE of 2048 tokens. Every newline is one token and every run of spaces one piece, so a prompt that ends in a newline
    leaves the indentation to the model; a word takes the one space, dot or underscore before it along."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\n| {2,}|[ ._]?\p{L}+| ?\d| ?[^\s\p{L}\d]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BEGIN, END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    return tokenizer


def encode_epoch(files, tokenizer, seed):
    """One pass over `files` as a flat int16 tensor [tokens], shuffled by `seed`.

    Half of the files are cut before each top-level def or class into documents of their own, so that <|begin|> may be followed by a
    function and a finished function by <|end|>. Text is encoded in pieces cut at random characters, because a prompt may end anywhere:
    in the middle of a word, or after a space that the tokenizer would otherwise have given to the next word."""
    dice = random.Random(seed)
    documents = []
    for _, text in files:
        split = dice.random() < 0.5
        documents += re.split(r"(?<=\n\n)(?=@|def |class |async def |if __name__)", text) if split else [text]
    dice.shuffle(documents)
    pieces, document_of = [], []
    for index, text in enumerate(documents):
        start = 0
        while start < len(text):
            end = start + 1 + int(dice.expovariate(1 / 400))
            pieces.append(text[start:end])
            document_of.append(index)
            start = end
    begin, end_id = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    tokens, previous = [], None
    for index, encoding in zip(document_of, tokenizer.encode_batch_fast(pieces, add_special_tokens=False)):
        if index != previous:
            tokens += [begin] if previous is None else [end_id, begin]
            previous = index
        tokens += encoding.ids
    return torch.tensor([*tokens, end_id], dtype=torch.int16)


def batches(files, tokenizer, *, seed, epoch, chunk, tokens_per_step, length_now):
    """Yields (epoch, chunk, ids int64 [rows, length + 1]) for ever, from the given place on; length_now() gives the rows' length, which
    divides CONTEXT. An epoch is a new shuffle, so the same (seed, epoch, chunk) is always the same batch."""
    per_step = tokens_per_step // CONTEXT
    while True:
        stream = encode_epoch(files, tokenizer, seed * 1000 + epoch).long()
        dice = torch.Generator().manual_seed(seed * 1000 + epoch)
        offset = int(torch.randint(0, CONTEXT, (1,), generator=dice))
        order = torch.randperm((len(stream) - offset - 1) // CONTEXT, generator=dice)
        for place in range(chunk, len(order) // per_step):
            length = length_now()
            starts = offset + order[place * per_step:(place + 1) * per_step] * CONTEXT
            starts = (starts[:, None] + torch.arange(0, CONTEXT, length)).flatten()
            yield epoch, place, stream[starts[:, None] + torch.arange(length + 1)]         # [rows, length + 1]
        epoch, chunk = epoch + 1, 0
