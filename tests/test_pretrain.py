"""Pretraining: reproducible, learning, and the embedded model it made."""

import pathlib

import jax
import numpy as np
import pytest

import jes.models
from jes import pretrain
from jes.models.weights import load
from jes.sampling.generate import generate
from jes.tasks import tiny, tiny_facts

EMBEDDED = pathlib.Path(jes.models.__file__).parent / "tiny"
TEXTS = [
    "12+34=",
    " two  spaces\nand a newline ",
    "".join(pretrain.CHARACTERS),
    "use ' s , . n't do not clean",
    "<|user|>hi<|assistant|>yo<eos>",
]


def leaves(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def a_few_steps():
    """A new model after 25 steps, and its losses."""
    model, params = pretrain.initial(pretrain.hf_config("nano"), seed=0)
    return pretrain.fit(model, params, pretrain.corpus(0), 25, 4e-3)


@pytest.mark.slow
def test_training_is_reproducible():
    (first, losses), (same, again) = a_few_steps(), a_few_steps()
    assert losses == again
    for a, b in zip(leaves(first), leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_few_steps_learn():
    _, losses = a_few_steps()
    # ln 102 = 4.6 nats before any learning.
    assert losses[0] == pytest.approx(4.6, abs=0.3)
    assert losses[-1] < 3.3


def test_corpus_holds_nothing_out_of_bounds():
    characters = {i: token for token, i in pretrain.TOKENS.items()}
    held_out = {
        name: {ex["prompt"] for ex in tiny.tiny_task(name).test} for name in tiny.KINDS
    }
    forbidden = set().union(*held_out.values())
    never = {fact["key"] for fact in tiny_facts.facts_seen("never")}
    seen = set()
    for _, batch in zip(range(40), pretrain.corpus(0), strict=False):
        for length, (tokens, roles, weights) in batch.items():
            assert (weights == 1).all()
            assert tokens.shape == roles.shape == (pretrain.ROWS[length], length)
            assert (tokens[:, -1] == pretrain.TOKENS["<eos>"]).all()
            for row, role in zip(tokens, roles, strict=True):
                prompt = "".join(characters[i] for i in row[role == 0])
                prompt = prompt.removeprefix("<|user|>").removesuffix("<|assistant|>")
                seen.add(prompt)
                if "city of " in prompt:
                    assert prompt[prompt.index("city of ") + 8 : -1] not in never
    assert not seen & forbidden
    assert len(seen) > 3000


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(text):
    tokenizer = pretrain.make_tokenizer()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_is_one_token_a_character():
    tokenizer = pretrain.make_tokenizer()
    assert len(tokenizer.encode("reverse abc:").ids) == 12
    assert tokenizer.encode("é").tokens == ["<unk>"]
    assert tokenizer.get_vocab_size() == pretrain.hf_config("tiny")["vocab_size"]


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, contents in pretrain.folder_files(pretrain.hf_config("tiny")).items():
        (tmp_path / name).write_bytes(contents)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == pretrain.make_tokenizer().encode(text).ids
        assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "1+1="},
    ]
    rendered = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|system|>s<|user|>1+1=<|assistant|>"
    prefilled = tokenizer.apply_chat_template(
        [*chat, {"role": "assistant", "content": "2"}],
        tokenize=False,
        continue_final_message=True,
    )
    assert prefilled == "<|system|>s<|user|>1+1=<|assistant|>2"


def test_embedded_folder_is_small():
    files = [f for f in EMBEDDED.iterdir() if f.is_file()]
    assert {f.name for f in files} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(f.stat().st_size for f in files) <= 4_000_000


def test_embedded_model_has_learned_the_prior_tasks():
    """One length of answers for all tasks, so that one program is compiled."""
    pretrained = load(EMBEDDED)
    for name in ("tiny/add", "tiny/sort", "tiny/facts_often"):
        task = tiny.tiny_task(name, train_size=8, test_size=128)
        prompts = [pretrained.tokenizer.encode(task.prompt(ex)) for ex in task.test]
        answers = generate(
            pretrained.model, pretrained.params, prompts, 6, eos_ids=pretrained.eos_ids
        )
        texts = map(pretrained.tokenizer.decode, answers)
        pairs = zip(task.test, texts, strict=True)
        strict = [task.reward(*pair).strict for pair in pairs]
        assert sum(strict) / len(strict) > 0.9, name
