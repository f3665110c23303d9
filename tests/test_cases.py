"""Inputs that went wrong elsewhere, by kind: each has its right value here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_run import get_config

import jes
from jes import train
from jes.config import default, freeze
from jes.errors import InputError
from jes.experiment import load_trainable
from jes.io import checkpoints, hosts
from jes.models.config import ModelConfig
from jes.models.safetensors_files import WeightsError
from jes.sampling.prompts import encode, encode_continuation
from jes.tasks import countdown, gsm8k, load_task, multiple_choice, rows
from jes.tasks.multiple_choice import KINDS

TOKENS = jnp.array([[3, 5, 7, 9]])


def change(folder: Path, **fields: Any) -> dict[str, Any]:
    """Changes fields of a config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    config = {key: value for key, value in config.items() if value != "none"}
    path.write_text(json.dumps(config))
    return config


@pytest.fixture
def model(tmp_path: Path, small_model: Path) -> Path:
    """A copy of the small model, to be changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in small_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# 1. Two fields or tensors for one thing.


def test_a_head_that_differs_from_a_tied_embedding_is_used(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(model, tie_word_embeddings=True)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.copy()
    save_file(tensors, path, metadata={"format": "pt"})
    tied = jes.load(model)
    assert "lm_head" not in tied.params
    tensors["lm_head.weight"] = head = embedding[::-1].copy()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"lm_head\.weight is another tensor"):
        untied = jes.load(model)
    np.testing.assert_array_equal(untied.params["lm_head"], head.T)
    untied.save(model.parent / "saved")
    again = jes.load(model.parent / "saved")
    np.testing.assert_array_equal(again.params["lm_head"], head.T)


HF = {
    "architectures": ["LlamaForCausalLM"],
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16},
    **{"num_hidden_layers": 1, "num_attention_heads": 2},
}
LLAMA3 = {
    "rope_type": "llama3",
    **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


def test_rope_parameters_count_as_in_transformers() -> None:
    new = {"rope_type": "default", "rope_theta": 1e6}
    found = ModelConfig.from_hf(HF | {"rope_theta": 1e4, "rope_parameters": new})
    assert found.rope_theta == 1e6
    both = {"rope_parameters": new, "rope_scaling": LLAMA3}
    with pytest.raises(
        ValueError, match=r"rope_parameters=.* and rope_scaling=.* differ"
    ):
        ModelConfig.from_hf(HF | both)
    same = {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LLAMA3}
    assert ModelConfig.from_hf(HF | same).rope_scaling is not None


# 3. Numbers that are not finite.


def test_members_that_overflow_are_counted_and_a_centre_stops_the_run(
    model: Path, tmp_path: Path
) -> None:
    """float16 activations beyond 65,504 made token 0, and no word of it."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name, values in tensors.items():
        if name.endswith(("v_proj.weight", "o_proj.weight")):
            tensors[name] = np.float32(6e4) * np.sign(values)
    save_file(tensors, path, metadata={"format": "pt"})
    pretrained = jes.load(model, dtype=jnp.float16)
    logits, _ = pretrained.model.apply({"params": pretrained.params}, TOKENS)
    assert not np.isfinite(np.asarray(logits)).any()
    (answer,) = jes.generate(pretrained.model, pretrained.params, [[3, 5]], 4)
    assert answer == []
    config = get_config(str(model))
    config.dtype = "float16"
    with pytest.raises(InputError, match=r"no finite reward: .* overflow in float16"):
        train.run(config, tmp_path / "run")


def test_a_member_that_overflows_earns_nothing(small_model: Path) -> None:
    from jes.core.noise import Noise
    from jes.experiment import make_experiment
    from jes.rollout import ask

    made = make_experiment(freeze(get_config(str(small_model))))
    questions = made.train[:4]
    settings = {"noise": Noise(sigma=1e38), "population": 2, "chunk": 2}
    key = jax.random.key(0)
    score = ask(made.evaluation, made.pretrained.params, key, questions, **settings)
    assert np.isnan(score.reward).all()
    likely = dataclasses.replace(settings["noise"], sigma=0.1)
    settings["noise"] = likely
    score = ask(made.evaluation, made.pretrained.params, key, questions, **settings)
    assert np.isfinite(score.reward).all()


def test_fitness_of_rewards_far_apart() -> None:
    found = jes.shape_fitness(jnp.array([-1e20, 0.0, 1.0]))
    np.testing.assert_allclose(found, [-(2**0.5), 0.5**0.5, 0.5**0.5], rtol=1e-6)
    found = jes.shape_fitness(jnp.array([3e38, -3e38, jnp.nan]))
    np.testing.assert_allclose(found, [1, -1, 0], rtol=1e-6)


# 4. Exceptions of others.


def test_templates_that_refuse(model: Path) -> None:
    tokenizer = jes.load(model).tokenizer
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode(tokenizer, chat)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    message = "refuses messages of system, user: System role not supported"
    with pytest.raises(InputError, match=message):
        encode(tokenizer, chat)


def test_a_template_of_one_s_own(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}")
    config = get_config(str(model))
    config.chat_template, config.template_kwargs = str(file), '{"mark": "!"}'
    pretrained = load_trainable(freeze(config))
    found = encode(pretrained.tokenizer, [{"role": "user", "content": "ab"}])
    assert found == encode_continuation(pretrained.tokenizer, "ab!")
    pretrained.save(tmp_path / "saved")
    assert jes.load(tmp_path / "saved").tokenizer.chat_template == file.read_text()
    config.template_kwargs = "mark"
    with pytest.raises(InputError, match="template_kwargs are JSON"):
        load_trainable(freeze(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": None}, "rope_theta must be a positive number, not None"),
        ({"rope_theta": "1e6"}, "rope_theta must be a positive number, not '1e6'"),
        ({"num_hidden_layers": "2"}, "must be a whole number from 1 to 1,000, not '2'"),
        ({"hidden_size": -32}, "must be a whole number from 1 to 1,000,000, not -32"),
        ({"eos_token_id": "1"}, "eos_token_id='1' is no token id"),
    ],
)
def test_fields_of_other_types(
    fields: dict[str, Any], message: str, model: Path
) -> None:
    change(model, **fields)
    (model / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(WeightsError, match=message):
        jes.load(model)


def test_dtype_auto_says_nothing(model: Path) -> None:
    change(model, torch_dtype="auto", dtype="none")
    assert jes.load(model).stored_dtype is None


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("arc_c", {"question": "q", "choices": '{"text": []}', "answerKey": "A"}),
        (
            "arc_c",
            {
                "question": "q",
                "choices": {"text": list("uvwxyz"), "label": list("ABCDEF")},
                "answerKey": "F",
            },
        ),
        ("mmlu_pro", {"question": None, "options": ["a"], "answer": "A"}),
        ("hellaswag", {"ctx": "c", "endings": [1, 2], "label": "0"}),
    ],
)
def test_choices_of_other_types(kind: str, row: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is not as expected"):
        multiple_choice._example(KINDS[kind], row)


@pytest.mark.parametrize("answer", [None, 12])
def test_solutions_of_other_types(answer: Any) -> None:
    with pytest.raises(InputError, match="is no text"):
        gsm8k._example({"question": "q", "answer": answer})


@pytest.mark.parametrize("numbers", ["1 2 3", None, [1, "2"], []])
def test_numbers_of_other_types(numbers: Any) -> None:
    with pytest.raises(InputError, match="are not whole numbers"):
        countdown._example(numbers, 3)


def test_a_coordinator_has_a_port() -> None:
    with pytest.raises(InputError, match="must be host:port"):
        hosts.join("localhost", 2, 0, 5)


# 5. What jes did not write.


def test_folders_of_others_stay(tmp_path: Path) -> None:
    for name in ("2", "9", "2-hf", "5.orbax-checkpoint-tmp", "old.orbax-checkpoint"):
        (tmp_path / name).mkdir()
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "7").touch()
    checkpoints.tidy(tmp_path, 4)
    assert checkpoints.saved(tmp_path) == [2]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"2", "2-hf", "old.orbax-checkpoint", ".DS_Store", "7"}


# 6. Incomplete data.


def test_a_part_of_a_split_that_is_missing_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"a": [1, 2]})
    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    for number in (0, 1):
        name = f"train-{number:05d}-of-00002.parquet"
        parquet.write_table(table, tmp_path / "gsm8k" / "main" / name)
    read = lambda: rows.read_rows("openai/gsm8k", "main", "train", ["a"], str(tmp_path))  # noqa: E731
    assert len(read()) == 4
    (tmp_path / "gsm8k" / "main" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet is missing"):
        read()


# 7. Extraction.


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### **12**", 12),
        ("#### x = 12", 12),
        ("#### 3 * 4 = 12.", 12),
        (r"\boxed{\$12}", 12),
        (r"\boxed{\text{12}}", 12),
        ("<answer>12 apples</answer>", 12),
        ("#### +42", 42),
        (r"\boxed{1{,}234}", 1234),
        ("#### 1,234,567", 1_234_567),
        ("#### -$3", -3),
        ("#### 1,2,3", None),
        ("#### none", None),
        ("#### 12\n" + "x" * 4200, 12),
    ],
)
def test_a_marked_number(text: str, number: float | None) -> None:
    assert gsm8k.find(f"there are 7 apples\n{text}") == number


def test_the_published_rule_is_kept_by_name() -> None:
    row = {"answer": 12.0}
    assert gsm8k.reward(row, "7 apples\n#### **12**").correct
    assert not gsm8k.reward(row, "7 apples\n#### **12**", published=True).correct
    reward = multiple_choice._reward
    row = {"answer": "A", "options": "abcde"}
    text = "B or C? ANSWER: **A**"
    assert reward(KINDS["arc_c_cot"], row, text).correct
    assert not reward(KINDS["arc_c_cot"], row, text, published=True).correct


@pytest.mark.parametrize(
    ("kind", "gold", "text"),
    [
        ("arc_c", "D", "d"),
        ("arc_c", "D", "(d)."),
        ("arc_c", "B", "<think>A or C?</think>\n\nB"),
        ("arc_c", "A", "A is correct."),
        ("arc_c", "A", "Option A is the best"),
        ("arc_c", "B", "A dog cannot. B"),
        ("arc_c_cot", "A", "B or C? ANSWER: **A**"),
        ("arc_c_cot", "B", "<think>The answer is (C)</think> The answer is (B)."),
        ("mmlu_pro", "A", "ANSWER: **A**"),
        ("hellaswag", "2", "<think>1 or 3?</think>\n\n2"),
        ("piqa", "2", "<think>1?</think>\n\n2"),
    ],
)
def test_a_stated_choice(kind: str, gold: str, text: str) -> None:
    row = {"answer": gold, "options": "abcdefghij"}
    assert multiple_choice._reward(KINDS[kind], row, text).correct


# 8. What the model was trained with.


def test_raw_prompts_begin_as_texts_did(tmp_path: Path) -> None:
    """A Llama tokenizer puts a token before every text; a Qwen tokenizer none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, "?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    assert encode(plain, "a b") == [1, 2]
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    llama = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    assert encode(llama, "a b") == [0, 1, 2]
    assert encode(llama, "<s> a b") == [0, 1, 2]
    assert encode_continuation(llama, "a b") == [1, 2]


# What a new user stumbled on.


def test_decay_needs_a_coefficient() -> None:
    config = default()
    config.decay = "l2"
    with pytest.raises(InputError, match="does nothing with decay_coefficient=0"):
        freeze(config)


def test_a_model_has_a_short_repr(small_model: Path) -> None:
    assert repr(jes.load(small_model)) == "Pretrained(qwen2, 12,640 parameters)"


def test_names_of_tasks_are_short_to_read() -> None:
    with pytest.raises(InputError) as caught:
        load_task("no/such")
    assert len(str(caught.value)) < 500
